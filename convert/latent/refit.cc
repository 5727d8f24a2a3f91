#include "convert/latent/refit.h"

#include <Eigen/Dense>

#include "linalg/decompose.h"
#include "linalg/moments.h"

namespace relatent {

RefitSums::RefitSums(Index outputs, Index features)
    : feature_moment(MatrixD::Zero(features, features)), error_moment(MatrixD::Zero(outputs, features)) {}

void RefitSums::add(const MatrixF& features, const MatrixF& errors) {
  add_second_moment(features, feature_moment);
  add_cross_moment(errors, features, error_moment);
}

MatrixD refit_delta(const RefitSums& sums, double ridge) {
  MatrixD features = sums.feature_moment;
  mirror_lower(features);
  for (double rho = ridge; rho < 1; rho *= 10) {
    try {
      return ridge_solve(features, sums.error_moment.transpose(), rho).transpose();
    } catch (const NumericalError&) {
      // Not positive definite in working precision; a NaN fails every time and is reported below.
    }
  }
  return ridge_solve(features, sums.error_moment.transpose(), 1).transpose();
}

}  // namespace relatent
