// Closed forms to a canonical layer: one branch for each latent, MLA when all heads read one.
#pragma once

#include <optional>
#include <vector>

#include "convert/latent/maps.h"
#include "convert/model/attention.h"

namespace relatent {

// Puts the pieces together as a canonical latent layer with a branch for each latent; the latents' heads are
// all heads in order. query, when given, replaces
// q_proj by a product of two. moments fill in the mean squares of the latents. Content and value
// up-projections are repeated for the heads of a group.
LatentAttention assemble(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                         const std::vector<JointLatent>& latents, const std::optional<LowRankQuery>& query);

// The same with one latent that every head reads.
LatentAttention assemble_mla(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                             const JointLatent& latent, const std::optional<LowRankQuery>& query);

}  // namespace relatent
