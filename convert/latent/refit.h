// Closed-form refits of a linear map by ridge regression: no gradients, no training.
#pragma once

#include "convert/compute/statistics.h"
#include "convert/model/attention.h"
#include "linalg/matrix.h"

namespace relatent {

// What a ridge is multiplied by for so many tokens and features: the fewer tokens there are for each feature,
// the more of what they say is chance. 1 for plenty.
double ridge_for_scarcity(Index tokens, Index features);

// Δ = E Aᵀ (A Aᵀ + ρ I)⁻¹ with ρ = ridge * mean diagonal of A Aᵀ: the change of the map that leaves the least
// squared error. ρ is raised tenfold at a time, to at most the mean diagonal itself, while the system is not
// positive definite; [out, F].
MatrixD refit_delta(const RefitSums& sums, double ridge);

// Adds that change, its ridge raised for scarcity, to o; the last feature is what a bias is multiplied by.
void refit_output(const RefitSums& sums, double ridge, Linear& o);

}  // namespace relatent
