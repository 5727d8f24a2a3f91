// Causal attention over one sequence.
#pragma once

#include <vector>

#include "convert/model/attention.h"
#include "convert/model/rotary.h"
#include "linalg/matrix.h"

namespace relatent {

// How the outputs of every head are seen in the layer's: R_h, [v size, v size] and symmetric, with
// R_h² = W_{O,h}ᵀ W_{O,h}.
std::vector<MatrixF> output_roots(const Attention& attention);

// Sums over the queries t of one sequence, of attention weights p_tn on keys n, with o_t = Σ_n p_tn v_n.
struct AttentionSums {
  // roots: output_roots, which must outlive this; none for no score_effect.
  AttentionSums(Index heads, Index length, const std::vector<MatrixF>* roots = nullptr);

  MatrixD distance_mass;  // [heads, length]: p of keys Δ = column positions back, but for the first key
  VectorD received;       // [length]: Σ over heads and queries of p on the key at this position
  VectorD mass_square;    // [heads]: Σ p²
  VectorD score_effect;   // [heads]: Σ p² |R_h (v_n - o_t)|², what errors of the scores do to the output
  const std::vector<MatrixF>* roots;
};

// Runs attention over one sequence (row = position, from 0) and returns the concatenated head outputs before
// o_proj, [length, heads * v size]. x is the normed input [length, hidden]; table must cover length. sums,
// when given, are added to; a head of several branches counts their mean.
MatrixF attention_forward(const GqaAttention& attention, const MatrixF& x, const RotaryTable& table,
                          AttentionSums* sums = nullptr);
MatrixF attention_forward(const LatentAttention& attention, const MatrixF& x, const RotaryTable& table,
                          AttentionSums* sums = nullptr);
MatrixF attention_forward(const Attention& attention, const MatrixF& x, const RotaryTable& table,
                          AttentionSums* sums = nullptr);

// What attention adds to the stream, norm(o heads): heads as attention_forward returns them.
MatrixF attention_output(const Linear& o, const RmsNorm& output_norm, const MatrixF& heads);

// What x projects to: queries [length, heads * d], keys [length, kv_heads * d] and values.
struct GqaProjections {
  MatrixF q;
  MatrixF k;
  MatrixF v;
};
// Queries and keys normalised where the layer does that, and not rotated yet.
GqaProjections project_unrotated(const GqaAttention& attention, const MatrixF& x);
void rotate(const GqaAttention& attention, const RotaryTable& table, GqaProjections& projections);
// The same, rotated.
GqaProjections project(const GqaAttention& attention, const MatrixF& x, const RotaryTable& table);
MatrixF attention_forward(const GqaAttention& attention, const GqaProjections& projections,
                          AttentionSums* sums = nullptr);

// What LatentAttention's queries act on: x, or norm(q_down x), or with normed heads q̂, [length, heads * d],
// of which each head's query reads its own d.
MatrixF query_features(const LatentAttention& attention, const MatrixF& x);
// The queries of all heads, [length, heads * (n + p)], not rotated yet.
MatrixF queries_of(const LatentAttention& attention, const MatrixF& x);

// What latents and rotary keys read of grouped-query attention with normalised keys: [norm(k x), v x].
MatrixF key_features(const GqaAttention& attention, const MatrixF& x);
// The same by what LatentAttention keeps of it: f(x).
MatrixF key_features(const NormedHeads& heads, const MatrixF& x);

// Queries and keys of attention with one branch in latent space, for attention samples: one key for all
// heads.
struct MlaProjections {
  MatrixF query;  // [length, heads * (p + r)]: rotated rotary part, then U^K_hᵀ q^N_h
  MatrixF key;    // [length, p + r]: rotated rotary key, then the latent, norm and gain applied
};
MlaProjections project(const LatentAttention& attention, const MatrixF& x, const RotaryTable& table);

}  // namespace relatent
