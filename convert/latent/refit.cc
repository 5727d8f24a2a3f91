#include "convert/latent/refit.h"

#include <Eigen/Dense>
#include <algorithm>

#include "convert/compute/backend.h"
#include "linalg/moments.h"

namespace relatent {

double ridge_for_scarcity(Index tokens, Index features) {
  const double ratio = 16 * static_cast<double>(features) / static_cast<double>(tokens);
  return 1 + ratio * ratio;
}

MatrixD refit_delta(const RefitSums& sums, double ridge) {
  MatrixD features = sums.feature_moment;
  mirror_lower(features);
  const double last = std::max(ridge, 1.0);
  for (double rho = ridge; rho < last; rho *= 10) {
    try {
      return backend().ridge_solve(features, sums.error_moment.transpose(), rho).transpose();
    } catch (const NumericalError&) {
      // Not positive definite in working precision; a NaN fails every time and is reported below.
    }
  }
  return backend().ridge_solve(features, sums.error_moment.transpose(), last).transpose();
}

void refit_output(const RefitSums& sums, double ridge, Linear& o) {
  const Index features = o.weight.cols();
  const MatrixD delta = refit_delta(sums, ridge * ridge_for_scarcity(sums.tokens, features));
  o.weight = (o.weight.cast<double>() + delta.leftCols(features)).cast<float>();
  if (o.bias.size() > 0) {
    o.bias = (o.bias.cast<double>() + delta.col(features).transpose()).cast<float>();
  }
}

}  // namespace relatent
