#include "convert/latent/refit.h"

#include <Eigen/Dense>
#include <algorithm>

#include "linalg/decompose.h"
#include "linalg/moments.h"

namespace relatent {

RefitSums::RefitSums(Index outputs, Index features)
    : feature_moment(MatrixD::Zero(features, features)), error_moment(MatrixD::Zero(outputs, features)) {}

void RefitSums::add(const MatrixF& features, const MatrixF& errors) {
  add_second_moment(features, feature_moment);
  add_cross_moment(errors, features, error_moment);
}

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
      return ridge_solve(features, sums.error_moment.transpose(), rho).transpose();
    } catch (const NumericalError&) {
      // Not positive definite in working precision; a NaN fails every time and is reported below.
    }
  }
  return ridge_solve(features, sums.error_moment.transpose(), last).transpose();
}

}  // namespace relatent
