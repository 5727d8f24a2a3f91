// MLA as the source: one latent c that all heads read, usually normalised, to latents in groups and parts.
#pragma once

#include "convert/latent/absorbed.h"
#include "convert/latent/maps.h"
#include "convert/latent/partition.h"

namespace relatent {

struct FromMlaOptions {
  Partition partition;
  Index rank = 0;             // of each group
  Index key_rank = 0;         // with several parts: coordinates that they share
  double value_weight = 0.1;  // of values in the shared coordinates
  double key_weight = 1;      // of A_K, as joint_latent.h has it
};

// The source keeps its rotary key. Its latent ĉ, gain applied, is seen by the keys through A_K² =
// Σ_h κ_h s² U^K_hᵀ E[q_h q_hᵀ] U^K_h and by the outputs through A_V² = Σ_h β_h (O_h U^V_h)ᵀ O_h U^V_h, the
// heads those of a group and s the scale of scores; where the effects are not known, 1 in the place of κ s²
// and β, each divided by its trace against S = E[ĉ ĉᵀ] (before the norm, which only scales it). A group of
// one part takes the leading eigenvectors of M S M with M² = A_K² + A_V²; of
// several parts, key_rank of them with value_weight² A_V² in the place of A_V², and for the rest the leading
// eigenvectors of what those leave of S under A_V.
//
// The norm stays exact: what the latents are divided by is that of the source's own rows (norm_rows), which
// every device can hold as it holds them today. input_moment = E[x̃ x̃ᵀ], query_moments the same of what the
// queries act on. source has one branch.
AbsorbedAttention from_mla(const LatentAttention& source, MomentRef input_moment,
                           const QueryMoments& query_moments, const HeadEffects& effects,
                           const FromMlaOptions& options);

// O_h U^V_h of every head: what ĉ does to the output, [hidden, heads * r].
MatrixF mla_value_map(const LatentAttention& source);

}  // namespace relatent
