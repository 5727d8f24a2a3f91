// Sums over tokens that the backend forms and the algebra works with.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "linalg/matrix.h"

namespace relatent {

// Next-token statistics of one model, or of two side by side, over all sequences: a sequence's last position
// predicts nothing.
struct LogitComparison {
  std::int64_t tokens = 0;  // predictions scored
  // Positions where a logit of either model is NaN or infinite. With any, all figures below but the share of
  // agreement are NaN, which no limit lets pass.
  std::int64_t non_finite = 0;
  double source_nll = 0;  // mean negative log likelihood, nats
  double converted_nll = 0;
  double mean_kl = 0;  // KL(source ‖ converted), nats, over all positions
  double max_kl = 0;
  double top1_agreement = 0;  // share of positions with the same most likely token
  double max_abs_logit_diff = 0;
  double rel_logit_error = 0;  // ‖converted - source‖ / ‖source‖ over all logits
};

// Of one layer in two models, over all tokens.
struct LayerDifference {
  double attention = 0;  // ‖attention output difference‖² (o_proj included)
  double attention_source = 0;
  double residual = 0;  // the same of the residual stream after the layer
  double residual_source = 0;
};

// Sums over tokens of a feature vector a (what a linear map reads) and of the error e that the map's output
// should make good.
struct RefitSums {
  MatrixD feature_moment;  // [F, F], Σ a aᵀ (lower triangle)
  MatrixD error_moment;    // [out, F], Σ e aᵀ
  Index tokens = 0;
  double error_square = 0;  // Σ |e|², of an OutputProblem
};

// What o_proj reads on the converted stream, and what a refit of it needs.
struct HeadOutputs {
  MatrixF values;  // [tokens, H w]
  RefitSums sums;  // of [values, 1] or, where o_proj has no bias, [values, 0]
};

// Means over tokens.
struct MeanMoments {
  MatrixD second;  // E[x xᵀ]
  VectorD mean;    // E[x]
};

// A coordinate that either half of the inputs reads with a map of its own, [D + 1] each.
struct CoordinateByHalf {
  Index index = 0;
  std::array<VectorD, 2> maps;
};

// Of u_j = unit_j (map_j x̃)² over inputs x̃, whose halves are the first and the last rows.
struct SquareMoments {
  VectorD unit;
  std::array<MeanMoments, 2> halves;
  MeanMoments all;
};

}  // namespace relatent
