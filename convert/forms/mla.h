// MLA: one latent that every head reads.
#pragma once

#include <optional>

#include "convert/latent/maps.h"
#include "convert/model/attention.h"

namespace relatent {

// Puts the pieces together as a canonical latent layer with a single branch. query, when given, replaces
// q_proj by a product of two. moments fill in the mean squares of the latents. Content and value
// up-projections are repeated for the heads of a group.
LatentAttention assemble_mla(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                             const JointLatent& latent, const std::optional<LowRankQuery>& query);

}  // namespace relatent
