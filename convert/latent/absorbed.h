// To and from the absorbed form of a latent attention layer.
#pragma once

#include <vector>

#include "convert/compute/absorbed_attention.h"
#include "convert/latent/maps.h"
#include "convert/model/attention.h"
#include "linalg/matrix.h"

namespace relatent {

// Makes `count` parts that share key_rank coordinates (a single one shares none) and divide the rest as
// evenly as can be. A head's query begins with rope_dim rotary rows.
void divide(Index count, Index key_rank, Index rope_dim, LatentGroup& group);

// Latent rows that the scores of a part read: [shared + part, D + 1].
MatrixD key_latent_of(const AbsorbedAttention& attention, const LatentGroup& group, const LatentPart& part);

// The latents' heads are all heads in order. A latent with a key_rank is cut into `parts` that share those
// coordinates; scores read no others yet.
AbsorbedAttention absorb(const LayerMaps& maps, const RotaryKey& key, const std::vector<JointLatent>& latents,
                         Index parts);

// Brings the content queries of every head, all parts together, down to nope_dim ranks where they have more:
// among all such queries, those with the nearest content scores, E‖S^½ (B - B') x̃‖² least, S the covariance
// of the latent that a part reads. input_moment = E[x̃ x̃ᵀ], [D + 1, D + 1]; query_moments the same of what
// the queries act on.
void limit_content_rank(AbsorbedAttention& attention, MomentRef input_moment,
                        const QueryMoments& query_moments);

// The canonical layer: branch part * groups + group, as partition.h numbers them. The content rows that
// a head does not need are zero. With a completion the latent carries its extra coordinates and an RMSNorm of
// unit gain.
LatentAttention to_latent_attention(const AbsorbedAttention& attention, MomentRef input_moment,
                                    const QueryMoments& query_moments);

// The same for queries that act on x̃, and for one latent.
inline void limit_content_rank(AbsorbedAttention& attention, MomentRef input_moment) {
  limit_content_rank(attention, input_moment, input_moment);
}
inline LatentAttention to_latent_attention(const AbsorbedAttention& attention, MomentRef input_moment) {
  return to_latent_attention(attention, input_moment, input_moment);
}
inline AbsorbedAttention absorb(const LayerMaps& maps, const RotaryKey& key, const JointLatent& latent) {
  return absorb(maps, key, std::vector<JointLatent>{latent}, 1);
}

}  // namespace relatent
