// A latent attention layer with everything absorbed: the working form of the fits.
#pragma once

#include <vector>

#include "convert/latent/maps.h"
#include "convert/latent/norm_completion.h"
#include "convert/model/attention.h"
#include "linalg/matrix.h"

namespace relatent {

// Some of a group's own coordinates, which one branch holds.
struct LatentPart {
  Index first = 0;  // among the group's coordinates
  Index rank = 0;
  Index query = 0;  // its rows of a head's query start here; shared + rank of them
};

// Heads that read the same latent coordinates. Each of its parts is a branch that forms scores of its own
// from the shared coordinates and the part's.
struct LatentGroup {
  Index first_head = 0;
  Index head_count = 0;
  Index first = 0;   // of its coordinates among all latent coordinates
  Index rank = 0;    // shared ones first, then the parts' in order
  Index shared = 0;  // coordinates that every part reads
  std::vector<LatentPart> parts;

  Index width(const LatentPart& part) const { return shared + part.rank; }
  // Rows of a head's query.
  Index query_rows() const { return parts.back().query + width(parts.back()); }
  // Makes `count` parts that share key_rank coordinates (a single one shares none) and divide the rest as
  // evenly as can be. A head's query begins with rope_dim rotary rows.
  void divide(Index count, Index key_rank, Index rope_dim);
};

// One layer on inputs x̃ = [x; 1]; for head h and part b of its group
//   z_b = [RoPE(k^R); c_shared; c_b],  [k^R; c] = key x̃  (c / ρ where there is one),
//   u_hb = [RoPE(u^R_h); u^N_hb],  [u^R_h; u^N_h1; ...] = query[h] x̃, x̃ or what a low-rank query leaves of
//   it, out = Σ_h O_h value_up[h] (Σ_n softmax_n(u_hb · z_b,n) c_gn, every c under its own part's weights,
//   the shared ones under the first's) + o_bias
// A score is bilinear in (query, key), so either is a least-squares problem given the other.
struct AbsorbedAttention {
  Index nope_dim = 0;               // content coordinates per head that the written form has room for
  double scale = 0;                 // softmax scale of the written form; already in `query`
  Rotary rotary;                    // p/2 frequencies
  MatrixD key;                      // [p + r, D + 1]
  std::vector<LatentGroup> groups;  // of heads in order
  std::vector<MatrixD> query;       // per head [p + Σ_b (shared + part), Q + 1]
  std::vector<MatrixD> value_up;    // per head [w, group's rank]
  MatrixD o;                        // [D, H w]
  VectorD o_bias;                   // [D]
  NormCompletion norm;              // with one group of one part only
  // Or ρ(x) = √(mean((norm_rows x)²) + norm_eps), which does not depend on `key`.
  MatrixF norm_rows;  // [norm rank, D]
  float norm_eps = 0;

  Index heads() const { return static_cast<Index>(value_up.size()); }
  Index rope_dim() const { return 2 * static_cast<Index>(rotary.inv_freq.size()); }
  Index rank() const { return key.rows() - rope_dim(); }
  Index width() const { return key.rows(); }
  Index v_dim() const { return value_up.front().rows(); }
  auto latent() const { return key.bottomRows(rank()); }
  auto latent_of(const LatentGroup& group) const {
    return key.middleRows(rope_dim() + group.first, group.rank);
  }
  // Latent rows that the scores of a part read: [shared + part, D + 1].
  MatrixD key_latent_of(const LatentGroup& group, const LatentPart& part) const;
};

// What ρ leaves of the latent of every row of inputs x̃ [tokens, D + 1]: 1/ρ. Empty without one.
VectorF latent_shrink(const AbsorbedAttention& attention, const MatrixF& inputs);

// The latents' heads are all heads in order. A latent with a key_rank is cut into `parts` that share those
// coordinates; scores read no others yet.
AbsorbedAttention absorb(const LayerMaps& maps, const RotaryKey& key, const std::vector<JointLatent>& latents,
                         Index parts);

// Brings the content queries of every head, all parts together, down to nope_dim ranks where they have more:
// among all such queries, those with the nearest content scores, E‖S^½ (B - B') x̃‖² least, S the covariance
// of the latent that a part reads. input_moment = E[x̃ x̃ᵀ], [D + 1, D + 1]; query_moment the same of what the
// queries act on.
void limit_content_rank(AbsorbedAttention& attention, MomentRef input_moment, MomentRef query_moment);

// The canonical layer: branch part * groups + group, as partition.h numbers them. The content rows that
// a head does not need are zero. With a completion the latent carries its extra coordinates and an RMSNorm of
// unit gain.
LatentAttention to_latent_attention(const AbsorbedAttention& attention, MomentRef input_moment,
                                    MomentRef query_moment);

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
