// A latent attention layer with everything absorbed: the working form of the fits.
#pragma once

#include <vector>

#include "convert/latent/maps.h"
#include "convert/latent/norm_completion.h"
#include "convert/model/attention.h"
#include "linalg/matrix.h"

namespace relatent {

// Heads that read the same latent coordinates.
struct LatentGroup {
  Index first_head = 0;
  Index head_count = 0;
  Index first = 0;     // of its coordinates among all latent coordinates
  Index rank = 0;      // that values read
  Index key_rank = 0;  // that scores read: the leading ones
};

// One layer on inputs x̃ = [x; 1]; for a head of group g
//   z = [RoPE(k^R); c_g without its last rank - key_rank],  [k^R; c] = key x̃  (c / ρ where there is one),
//   u_h = query[h] q̃, its first p rows rotated like the key; q̃ = x̃, or what a low-rank query leaves of it,
//   out = Σ_h O_h value_up[h] (Σ_n softmax_n(u_h · z_n) c_gn) + o_bias
// The score of a head is bilinear in (query[h], key), so either is a least-squares problem given the other.
struct AbsorbedAttention {
  Index nope_dim = 0;               // content coordinates per head that the written form has room for
  double scale = 0;                 // softmax scale of the written form; already in `query`
  Rotary rotary;                    // p/2 frequencies
  MatrixD key;                      // [p + r, D + 1]
  std::vector<LatentGroup> groups;  // of heads in order
  std::vector<MatrixD> query;       // per head [p + key_rank, Q + 1]
  std::vector<MatrixD> value_up;    // per head [w, rank]
  MatrixD o;                        // [D, H w]
  VectorD o_bias;                   // [D]
  NormCompletion norm;              // with one group only

  Index heads() const { return static_cast<Index>(query.size()); }
  Index rope_dim() const { return 2 * static_cast<Index>(rotary.inv_freq.size()); }
  Index rank() const { return key.rows() - rope_dim(); }
  Index width() const { return key.rows(); }
  Index v_dim() const { return value_up.front().rows(); }
  auto latent() const { return key.bottomRows(rank()); }
  auto latent_of(const LatentGroup& group) const {
    return key.middleRows(rope_dim() + group.first, group.rank);
  }
  auto key_latent_of(const LatentGroup& group) const {
    return key.middleRows(rope_dim() + group.first, group.key_rank);
  }
};

// What ρ leaves of the latent of every row of inputs x̃ [tokens, D + 1]: 1/ρ. Empty without a completion.
VectorF latent_shrink(const AbsorbedAttention& attention, const MatrixF& inputs);

// The latents' heads are all heads in order.
AbsorbedAttention absorb(const LayerMaps& maps, const RotaryKey& key,
                         const std::vector<JointLatent>& latents);

// Brings the content queries down to nope_dim ranks where they have more: among all such queries, those with
// the nearest content scores, E‖S^½ (B - B') x̃‖² least, S the covariance of the latent. input_moment =
// E[x̃ x̃ᵀ], [D + 1, D + 1]; query_moment the same of what the queries act on.
void limit_content_rank(AbsorbedAttention& attention, const MatrixD& input_moment,
                        const MatrixD& query_moment);

// The canonical layer with one branch for each group. The content rows that a head does not need are zero.
// With a completion the latent carries its extra coordinates and an RMSNorm of unit gain.
LatentAttention to_latent_attention(const AbsorbedAttention& attention, const MatrixD& input_moment,
                                    const MatrixD& query_moment);

// The same for queries that act on x̃, and for one latent.
inline void limit_content_rank(AbsorbedAttention& attention, const MatrixD& input_moment) {
  limit_content_rank(attention, input_moment, input_moment);
}
inline LatentAttention to_latent_attention(const AbsorbedAttention& attention, const MatrixD& input_moment) {
  return to_latent_attention(attention, input_moment, input_moment);
}
inline AbsorbedAttention absorb(const LayerMaps& maps, const RotaryKey& key, const JointLatent& latent) {
  return absorb(maps, key, std::vector<JointLatent>{latent});
}

}  // namespace relatent
