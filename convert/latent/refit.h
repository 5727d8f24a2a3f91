// Closed-form refits of a linear map by ridge regression: no gradients, no training.
#pragma once

#include "linalg/matrix.h"

namespace relatent {

// Sums over tokens of a feature vector a (what the map reads) and of the error e that the map's output should
// make good.
struct RefitSums {
  MatrixD feature_moment;  // [F, F], Σ a aᵀ (lower triangle)
  MatrixD error_moment;    // [out, F], Σ e aᵀ

  RefitSums(Index outputs, Index features);
  void add(const MatrixF& features, const MatrixF& errors);
};

// What a ridge is multiplied by for so many tokens and features: the fewer tokens there are for each feature,
// the more of what they say is chance. 1 for plenty.
double ridge_for_scarcity(Index tokens, Index features);

// Δ = E Aᵀ (A Aᵀ + ρ I)⁻¹ with ρ = ridge * mean diagonal of A Aᵀ: the change of the map that leaves the least
// squared error. ρ is raised tenfold at a time, to at most the mean diagonal itself, while the system is not
// positive definite; [out, F].
MatrixD refit_delta(const RefitSums& sums, double ridge);

}  // namespace relatent
