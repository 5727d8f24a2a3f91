// The linear maps of one attention layer in double precision, and what is known of its inputs: all that the
// algebra in this folder works on. It knows no files.
//
// Notation (H heads, K groups, d head size, D hidden size): biases are the last column of a map, which acts
// on [x; 1]. Keys of all groups are stacked to K d numbers, group by group; pair f of a head is (f, f + d/2),
// read as one complex number that RoPE at position n multiplies by exp(i θ_f n).
#pragma once

#include <optional>
#include <vector>

#include "convert/model/attention.h"
#include "formats/calibration_store.h"
#include "linalg/matrix.h"

namespace relatent {

// Where the source normalises its keys, x̃ is [f; 1] of NormedHeads (attention.h), of which keys and values
// are selections, and the query of head h acts on [q̂_h; 1].
struct LayerMaps {
  Index heads = 0;
  Index kv_heads = 0;
  Index head_dim = 0;
  // The two that are large stay as the source has them; the algebra widens them head by head.
  Linear q;        // [H d, D]
  MatrixF o;       // [D, H d]
  MatrixD k;       // [K d, D + 1]
  MatrixD v;       // [K d, D + 1]
  VectorD o_bias;  // [D], zero where the source has none
  double scale = 0;
  float softcap = 0;  // of scores, as attention.h has it
  Rotary rotary;
  std::optional<NormedHeads> normed_heads{};  // instead of q

  Index group_of(Index head) const { return head / (heads / kv_heads); }
  Index pairs() const { return head_dim / 2; }
  Index key_dim() const { return kv_heads * head_dim; }
  bool has_q_bias() const { return q.bias.size() > 0; }
  // Numbers that a head's query acts on, the constant apart: D or d.
  Index query_inputs() const { return normed_heads ? head_dim : k.cols() - 1; }
  MatrixD query_of(Index head) const;   // [d, query inputs + 1]
  MatrixD output_of(Index head) const;  // [D, d]
};

// The map of a projection, [out, in + 1].
MatrixD map_of(const Linear& linear);
// The way back; a bias of zeros is no bias.
Linear linear_of(const MatrixD& map);

LayerMaps maps_of(GqaAttention attention);
NormedHeads normed_heads_of(const GqaAttention& attention);

// For engines without biases: 1 ≈ wᵀ x with the w of least squares, w = E[x xᵀ]⁻¹ E[x], so that a bias b of
// q or v becomes b wᵀ in its weight. Returns ε = E(1 - wᵀ x)², the mean square of what that misses of a bias.
//
// Key biases are told apart by rotary frequency. The softmax forgets what all keys of a query have in common:
// of a bias b_f that keeps a part α in the weight, scores feel the rest only as far as its rotation varies
// over distance, (1 - α)² spread_f |b_f|², and what wᵀ x misses of the part itself, α² ε |b_f|². The sum is
// least for α = spread_f / (spread_f + ε): slow components, where published models keep biases of norm 100
// and more, are dropped, and fast ones are kept.
// spread: [K, d/2], constant_spread of rotary_key.h.
struct Moments;
double fold_biases(const Moments& moments, const MatrixD& spread, LayerMaps& maps);

// A second moment that somebody else holds: a matrix, or a diagonal as its entries, which makes products with
// maps of many columns cheap. Made of named objects only, since a temporary would be gone before it is read.
class MomentRef {
 public:
  MomentRef(const MatrixD& matrix) : matrix_(&matrix) {}
  MomentRef(const VectorD& diagonal) : diagonal_(&diagonal) {}
  MomentRef(const MatrixD&& matrix) = delete;
  MomentRef(const VectorD&& diagonal) = delete;

  Index size() const { return matrix_ != nullptr ? matrix_->rows() : diagonal_->size(); }
  // map M, of map [rows, size].
  MatrixD after(const MatrixD& map) const;
  // mapᵢᵀ M mapᵢ of every row.
  VectorD energies(const MatrixD& map) const;
  bool is_diagonal() const { return diagonal_ != nullptr; }
  VectorD last_column() const;
  VectorD diagonal() const;
  MatrixD matrix() const;

 private:
  const MatrixD* matrix_ = nullptr;
  const VectorD* diagonal_ = nullptr;
};

// Second moments of what queries act on: one for all heads, or one for each. Made of named objects only.
class QueryMoments {
 public:
  QueryMoments(MomentRef all) : all_(all) {}
  QueryMoments(const MatrixD& all) : all_(all) {}
  QueryMoments(const VectorD& all) : all_(all) {}
  // Not empty.
  QueryMoments(const std::vector<MatrixD>& each) : all_(each.front()), each_(&each) {}
  QueryMoments(const MatrixD&& all) = delete;
  QueryMoments(const VectorD&& all) = delete;
  QueryMoments(const std::vector<MatrixD>&& each) = delete;

  MomentRef of(Index head) const {
    return each_ != nullptr ? MomentRef((*each_)[static_cast<std::size_t>(head)]) : all_;
  }

 private:
  MomentRef all_;
  const std::vector<MatrixD>* each_ = nullptr;
};

// What errors of a head's attention do to the layer's output, to first order: E_t |Σ_n p_tn W_O,h δv_n|² is
// β E|W_O,h δv|², and E_t |Σ_n p_tn W_O,h (v_n - o_t) δs_tn|² is κ E δs², for errors that are independent.
struct HeadEffects {
  VectorD mass_square;   // [H], β = E_t Σ_n p_tn²
  VectorD score_effect;  // [H], κ = E_t Σ_n p_tn² |W_O,h (v_n - o_t)|²

  bool known() const { return mass_square.size() > 0; }
  // Weight of an error in a head's values, and of one in its scores before they are scaled; 1 where nothing
  // is known.
  double of_values(Index head) const { return known() ? mass_square(head) : 1; }
  double of_scores(Index head, double scale) const {
    return known() ? score_effect(head) * scale * scale : 1;
  }
};

struct Moments {
  // [D + 1, D + 1], E[x̃ x̃ᵀ] of x̃ = [x; 1], tokens weighted by the attention that they receive where that is
  // known: what keys and values are made of.
  MatrixD second;
  VectorD diagonal;  // [D + 1], instead: its entries when it has no others
  // [D + 1, D + 1]: the same with equal weights, for queries; empty where it is no other.
  MatrixD equal{};
  // [H, T]: attention mass at distance Δ, of the first key where that is known to be left out.
  MatrixD distance_mass;
  HeadEffects effects{};
  // [D]: E[x] where x̃ = [x; 0] says nothing of it; empty otherwise.
  VectorD mean{};
  // With normed heads, per head E[q̃ q̃ᵀ] of q̃ = [q̂_h; 1], [d + 1, d + 1].
  std::vector<MatrixD> query{};
  // Of a source with normed heads, on its input: E[q̂ x̃ᵀ] with equal weights, then E[k̂ x̃ᵀ] with those of
  // `second`, [(H + K) d, D + 1].
  MatrixD normed_cross{};
  VectorD normed_square{};  // E[q̂²], then E[k̂²], [(H + K) d]

  QueryMoments queries() const& { return query.empty() ? QueryMoments(asking()) : QueryMoments(query); }
  QueryMoments queries() const&& = delete;
  // What keys and values are made of.
  MomentRef input() const& { return diagonal.size() > 0 ? MomentRef(diagonal) : MomentRef(second); }
  MomentRef input() const&& = delete;
  // What queries are made of.
  MomentRef asking() const& { return equal.size() > 0 ? MomentRef(equal) : input(); }
  MomentRef asking() const&& = delete;
};

// Every token counts once for keys and values too.
Moments with_equal_weights(Moments moments);

Moments moments_of(const LayerMoments& layer);
// The same of f in the place of x. The layer has normed_heads.
Moments normed_moments_of(const LayerMoments& layer);

// What is known without calibration: x = gain ⊙ u with u of unit second moment and zero mean, and attention
// mass that falls as 1 / (1 + Δ) over `length` positions.
Moments moments_without_data(const RmsNorm& input_norm, Index heads, Index length);
// The same of f, to first order: a norm divides by the root of its expected mean square.
Moments normed_moments_without_data(const RmsNorm& input_norm, const GqaAttention& attention, Index length);

// For engines whose latents read nothing but the layer's input: queries and keys without their norms, as the
// linear maps (with biases) of x nearest to q̂ and k̂ in least squares over the calibration tokens, for k̂ by
// the attention that they receive.
GqaAttention linear_stand_in(GqaAttention attention, const Moments& moments);
// What it misses of how the keys vary, E|k̂ - W x̃|² / E|k̂ - E k̂|². keys: K d.
double stand_in_error(const Moments& moments, Index keys);

// How the keys' rotation is kept: a rotary key shared by all heads, and what is left over without rotation.
//   score of head h  ≈  (query[h] q_h) · RoPE(read k)  +  (content_query[h] q_h) · (residual k)_κ(h)
struct RotaryKey {
  MatrixD read;                        // [p, K d], half-split pairs in the order of rotary.inv_freq
  std::vector<MatrixD> query;          // per head [p, d]
  std::vector<MatrixD> content_query;  // per head [n, d]; n = d, or 0 when nothing is left over
  MatrixD residual;                    // [K d, K d]; [0, K d] when n = 0
  Rotary rotary;                       // p/2 frequencies

  Index rope_dim() const { return read.rows(); }
  Index nope_dim() const { return content_query.front().rows(); }
};

// One latent for the leftover keys r and the values v of the K' groups that some heads read:
//   c = down [x; 1],  r ≈ key_up c,  v ≈ value_up c + value_shift
// Keys may be confined to the leading coordinates: key_up is zero beyond them.
struct JointLatent {
  MatrixD down;         // [rank, D + 1]
  MatrixD key_up;       // [K' d, rank]; [0, rank] when there is no leftover
  MatrixD value_up;     // [K' d, rank]
  VectorD value_shift;  // [K' d], held by o_proj's bias because attention weights sum to 1
  Index first_kv_head = 0;
  Index first_head = 0;
  Index head_count = 0;             // 0 = all heads
  std::optional<Index> key_rank{};  // coordinates that keys may read; none = all

  Index rank() const { return down.rows(); }
  Index heads_of(Index all) const { return head_count > 0 ? head_count : all; }
};

// q ≈ lift (down [x; 1]) for the stacked queries of all heads.
struct LowRankQuery {
  MatrixD down;  // [q rank, D + 1]
  MatrixD lift;  // [H d, q rank]
};

// E[a aᵀ] of a = map x̃, [rows, rows], without the asymmetry of rounding. moment = E[x̃ x̃ᵀ].
MatrixD second_moment(const MatrixD& map, MomentRef moment);
inline MatrixD second_moment(const MatrixD& map, const Moments& moments) {
  return second_moment(map, moments.input());
}

}  // namespace relatent
