// The two kinds of attention, as weights and sizes.
#pragma once

#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "convert/model/rotary.h"
#include "linalg/matrix.h"
#include "linalg/packed.h"

namespace relatent {

// y = x weightᵀ + bias, for rows x.
struct Linear {
  MatrixF weight;   // [out, in]
  RowVectorF bias;  // [out], or empty for none
  // Instead of `weight`, which is then empty: for products in bfloat16.
  std::shared_ptr<const PackedWeight> packed{};

  // What gives outputs [first, first + count).
  Linear rows(Index first, Index count) const;
  Index out() const { return packed ? packed->out() : weight.rows(); }
  // Moves the weight into `packed`.
  void pack();
};

// RMSNorm with gain: x / sqrt(mean(x²) + eps) * gain, row by row. An empty gain means no norm at all.
struct RmsNorm {
  RowVectorF gain;
  float eps = 0;

  bool present() const { return gain.size() > 0; }
};

// Grouped-query attention; head h reads group h / (heads / kv_heads). Before they are rotated, queries and
// keys may be normalised: each head's numbers alone (Qwen3), or those of all heads together (OLMo 2), by the
// size of the gain.
struct GqaAttention {
  Index heads = 0;
  Index kv_heads = 0;
  Index head_dim = 0;
  std::optional<Index> window;  // positions a query sees, its own included; none = all
  float scale = 0;              // of q·k before the softmax
  float softcap = 0;            // scaled scores s become softcap tanh(s / softcap); 0 = they do not
  Linear q;                     // [heads * head_dim, hidden]
  Linear k;                     // [kv_heads * head_dim, hidden]
  Linear v;                     // [kv_heads * head_dim, hidden]
  Linear o;                     // [hidden, heads * head_dim]
  RmsNorm q_norm{};             // [head_dim] or [heads * head_dim]
  RmsNorm k_norm{};             // [head_dim] or [kv_heads * head_dim]
  Rotary rotary;                // over head_dim

  bool normed() const { return k_norm.present() || q_norm.present(); }
  Index group_of(Index head) const { return head / (heads / kv_heads); }
};

// One latent and the heads that read it. Its coordinates are those of a shared latent, if it reads one, and
// then its own.
struct LatentBranch {
  Linear down;                    // own rows [rank, inputs], what the cache holds (before a norm)
  std::optional<Index> shared{};  // index into LatentAttention::shared
  RmsNorm norm;                   // on the whole latent, where the engine insists on one
  MatrixF up;                     // [head_count * (nope_dim + v_dim), r_b]: per head U^K rows, then U^V rows
  Index first_head = 0;           // the branch serves heads first_head ... first_head + head_count - 1
  Index head_count = 0;
  double mean_square = 0;  // E|c_b|² / r_b where a conversion knows it; 0 = unknown
};

// What latents read instead of the layer's input where the source normalises its keys: a key that is
// normalised when it is written is no linear map of the input, but what is made of it and of the values is
// one of
//   f(x) = [norm(k x); v x],  and of the head's own  q̂_h = norm(q x)_h  for queries.
// Nothing of it is cached.
struct NormedHeads {
  Linear q;        // [all heads * d, hidden]
  RmsNorm q_norm;  // as in GqaAttention
  Linear k;        // [kv_heads * d, hidden]
  RmsNorm k_norm;
  Linear v;              // [kv_heads * d, hidden]
  Index head_dim = 0;    // d
  Index first_head = 0;  // of q, that is the layer's first
};

// The canonical latent form (with normed heads, read f(x) for x in what gives k^R and c_b, and q̂_h for x in
// the query of head h):
//   k^R = RoPE(rotary_key x),  c_b = norm([shared_s(b) x; down_b x]) / ρ(x)
//   s_hb = scale * (q^R_h · k^R + q^N_h · U^K_hb c_b),  out_h = Σ_b softmax(s_hb) U^V_hb c_b
// Branches of the same heads that read their keys from one shared latent alone attend alike (shared key,
// split value).
struct LatentAttention {
  Index heads = 0;
  Index nope_dim = 0;  // n
  Index rope_dim = 0;  // p
  Index v_dim = 0;     // w
  float scale = 0;
  float softcap = 0;  // as above
  // Optional low-rank query: q acts on norm(q_down x) when q_down has rows, else on x.
  Linear q_down;
  RmsNorm q_norm;
  double q_mean_square = 0;  // E|z|² / size of what q acts on (q_down x, or x), as above
  // [heads * (n + p), hidden, q rank or d]: per head n content rows, then p rotary rows (half-split)
  Linear q;
  std::optional<NormedHeads> normed_heads{};
  Linear rotary_key;           // [p, inputs], half-split; inputs = hidden, or the size of f(x)
  std::vector<Linear> shared;  // latents that several branches read
  // ρ(x) = √(mean((norm_rows x)²) + norm_eps), the same for all latents; no rows = 1.
  MatrixF norm_rows;  // [norm rank, hidden]
  float norm_eps = 0;
  std::vector<LatentBranch> branches;
  Linear o;  // [hidden, heads * w]
  Rotary rotary;

  Index total_rank() const;  // distinct latent coordinates
};

using Attention = std::variant<GqaAttention, LatentAttention>;

const Linear& output_projection(const Attention& attention);
inline const Linear& output_projection(const LatentAttention& attention) {
  return attention.o;
}
const Rotary& rotary_of(const Attention& attention);

}  // namespace relatent
