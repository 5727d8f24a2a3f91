#include "convert/latent/refit.h"

#include <gtest/gtest.h>

#include <limits>

#include "linalg/decompose.h"
#include "linalg/moments.h"
#include "tests/support/samples.h"

namespace relatent {
namespace {

using testing_support::Random;
using testing_support::relative_error;

MatrixD whole(const RefitSums& sums) {
  MatrixD out = sums.feature_moment;
  mirror_lower(out);
  return out;
}

RefitSums sums_of(const MatrixF& features, const MatrixF& errors) {
  RefitSums out{MatrixD::Zero(features.cols(), features.cols()),
                MatrixD::Zero(errors.cols(), features.cols()), features.rows()};
  add_second_moment(features, out.feature_moment);
  add_cross_moment(errors, features, out.error_moment);
  return out;
}

TEST(RidgeForScarcity, FallsToOneWithTheTokens) {
  EXPECT_GT(ridge_for_scarcity(10, 100), ridge_for_scarcity(100, 100));
  EXPECT_GT(ridge_for_scarcity(100, 100), ridge_for_scarcity(100, 10));
  EXPECT_GT(ridge_for_scarcity(1000, 10), 1);
  EXPECT_NEAR(ridge_for_scarcity(1'000'000'000, 10), 1, 1e-6);
}

TEST(RefitDelta, SolvesTheNormalEquations) {
  Random random(2);
  const RefitSums sums = sums_of(random.matrix(40, 9), random.matrix(40, 5));
  const MatrixD features = whole(sums);
  for (const double ridge : {0.0, 1e-9, 1e-3, 0.1, 0.9}) {
    const MatrixD delta = refit_delta(sums, ridge);
    const MatrixD system = features + ridge * features.diagonal().mean() * MatrixD::Identity(9, 9);
    EXPECT_LE(relative_error(MatrixD(delta * system), sums.error_moment), 1e-12) << ridge;
  }
}

TEST(RefitDelta, FindsAPlantedMap) {
  Random random(3);
  const MatrixF features = random.matrix(60, 9);
  const MatrixF planted = random.matrix(5, 9);
  MatrixF errors = features * planted.transpose();
  for (const double ridge : {0.0, 1e-10}) {
    EXPECT_LE(relative_error(refit_delta(sums_of(features, errors), ridge), planted), 1e-6) << ridge;
  }
  // What no feature tells of does not come in: noise that is orthogonal to the features.
  const MatrixD a = features.cast<double>();
  const MatrixD noise = random.matrix_d(60, 5);
  errors += (noise - a * ridge_solve(a.transpose() * a, a.transpose() * noise, 0)).cast<float>();
  EXPECT_LE(relative_error(refit_delta(sums_of(features, errors), 0), planted), 1e-5);
}

TEST(RefitDelta, AStrongRidgeLeavesTheMapAlone) {
  Random random(4);
  const RefitSums sums = sums_of(random.matrix(40, 9), random.matrix(40, 5));
  const double mean = sums.feature_moment.diagonal().mean();
  for (const double ridge : {1e2, 1e4, 1e6}) {
    // To first order in 1 / ridge.
    const MatrixD expected = sums.error_moment / (ridge * mean);
    EXPECT_LE(relative_error(refit_delta(sums, ridge), expected), 10 / ridge) << ridge;
  }
}

// Small whole numbers, so that the products are exact and the system exactly singular.
TEST(RefitDelta, RaisesTheRidgeWhereFeaturesAreSingular) {
  MatrixF features(4, 3);
  features << 1, 1, 0, 2, 2, 0, -1, -1, 0, 3, 3, 0;
  const MatrixF errors = 6 * features.col(0);
  const RefitSums sums = sums_of(features, errors);
  for (const double ridge : {1e-300, 1e-25, 1e-6}) {
    const MatrixD delta = refit_delta(sums, ridge);
    ASSERT_TRUE(delta.allFinite()) << ridge;
    // Equal features share what there is to say; where only a rounding error tells them apart, as it comes.
    EXPECT_NEAR(delta(0, 0) + delta(0, 1), 6, 1e-4) << ridge;
    EXPECT_NEAR(delta(0, 0) - delta(0, 1), 0, ridge == 1e-6 ? 1e-4 : 60) << ridge;
    EXPECT_EQ(delta(0, 2), 0) << ridge;
  }
  // Fewer tokens than features.
  Random random(5);
  const MatrixF few = random.matrix(5, 20);
  const MatrixF wanted = random.matrix(5, 3);
  const MatrixD delta = refit_delta(sums_of(few, wanted), 1e-8);
  EXPECT_LE(relative_error(MatrixD(few.cast<double>() * delta.transpose()), wanted), 1e-4);
}

TEST(RefitDelta, RefusesNaN) {
  Random random(6);
  for (const bool in_features : {false, true}) {
    RefitSums sums = sums_of(random.matrix(40, 9), random.matrix(40, 5));
    (in_features ? sums.feature_moment : sums.error_moment)(3, 2) = std::numeric_limits<double>::quiet_NaN();
    EXPECT_THROW(refit_delta(sums, 0.1), NumericalError);
  }
}

}  // namespace
}  // namespace relatent
