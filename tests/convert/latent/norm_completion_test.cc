#include "convert/latent/norm_completion.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <cmath>

#include "convert/compute/cpu/latent_norm.h"
#include "tests/support/samples.h"

namespace relatent {
namespace {

using testing_support::Random;
using testing_support::relative_error;

struct Sample {
  MatrixF inputs;  // x̃, ends in 0
  MatrixD moment;
  MatrixD latent;
};

Sample sample_of(std::uint32_t seed, Index tokens = 400, Index hidden = 20, Index rank = 7) {
  Random random(seed);
  Sample out;
  out.inputs = MatrixF::Zero(tokens, hidden + 1);
  out.inputs.leftCols(hidden) = testing_support::sample_inputs(random, tokens, hidden);
  const MatrixD x = out.inputs.cast<double>();
  out.moment = x.transpose() * x / static_cast<double>(tokens);
  out.latent = random.matrix_d(rank, hidden + 1);
  return out;
}

// ρ² of every token by the definition.
VectorD squares(const NormCompletion& norm, const Sample& sample) {
  MatrixD map(sample.latent.rows() + norm.extra.rows(), sample.latent.cols());
  map << sample.latent, norm.extra;
  return (sample.inputs.cast<double>() * map.transpose()).array().square().matrix() * norm.square;
}

double miss(const VectorD& rho_squared) {
  return (rho_squared.array() - 1).square().mean();
}

TEST(NormCompletion, InverseNormIsThatOfTheDefinition) {
  const Sample sample = sample_of(1);
  const NormCompletion norm = complete_norm(sample.latent, sample.inputs, sample.moment, 4);
  const VectorD expected = squares(norm, sample).cwiseSqrt().cwiseInverse();
  EXPECT_LE(relative_error(inverse_norm(norm, sample.latent, sample.inputs), expected), 1e-5);
}

TEST(NormCompletion, SquaresArePositiveAndNearTheBestThereAre) {
  const Sample sample = sample_of(2);
  for (const Index extra : {0, 3, 12}) {
    const NormCompletion norm = complete_norm(sample.latent, sample.inputs, sample.moment, extra);
    ASSERT_EQ(norm.extra.rows(), extra);
    ASSERT_EQ(norm.square.size(), sample.latent.rows() + extra);
    EXPECT_GT(norm.square.minCoeff(), 0);
    const double best = miss(squares(norm, sample));
    for (Index j = 0; j < norm.square.size(); ++j) {
      for (const double factor : {0.9, 1.1, 2.0}) {
        NormCompletion other = norm;
        other.square(j) *= factor;
        // Drawn a little towards equal shares, and none below its floor.
        EXPECT_GE(miss(squares(other, sample)), 0.99 * best) << "coordinate " << j << " times " << factor;
      }
    }
  }
}

TEST(NormCompletion, MoreCoordinatesSteadyTheNorm) {
  const Sample sample = sample_of(3);
  double before = 1;
  for (const Index extra : {0, 4, 20}) {
    const double now =
        miss(squares(complete_norm(sample.latent, sample.inputs, sample.moment, extra), sample));
    EXPECT_LT(now, before);
    before = now;
  }
}

// Coordinates of unit size for every token can be brought to a constant norm exactly.
TEST(NormCompletion, ConstantNormIsFound) {
  Sample sample = sample_of(4, 200, 6, 2);
  for (Index i = 0; i < sample.inputs.rows(); ++i) {
    const double angle = 0.1 * static_cast<double>(i);
    sample.inputs.row(i).setZero();
    sample.inputs(i, 0) = static_cast<float>(5 * std::cos(angle));
    sample.inputs(i, 1) = static_cast<float>(0.2 * std::sin(angle));
  }
  const MatrixD x = sample.inputs.cast<double>();
  sample.moment = x.transpose() * x / static_cast<double>(x.rows());
  sample.latent.setZero();
  sample.latent(0, 0) = 1;
  sample.latent(1, 1) = 1;
  const NormCompletion norm = complete_norm(sample.latent, sample.inputs, sample.moment, 0);
  EXPECT_NEAR(norm.square(0), 1 / 25.0, 1e-6);
  EXPECT_NEAR(norm.square(1), 25, 1e-3);
  EXPECT_LE(miss(squares(norm, sample)), 1e-10);
}

// What few tokens do not vary in, others do: their norm must not explode.
TEST(NormCompletion, HoldsOnTokensThatItHasNotSeen) {
  const Sample many = sample_of(6, 400, 20, 7);
  Sample few = many;
  few.inputs = many.inputs.topRows(10);
  const MatrixD x = few.inputs.cast<double>();
  few.moment = x.transpose() * x / 10.0;
  // Coordinates that the few tokens do not have at all, but for rounding.
  const Eigen::SelfAdjointEigenSolver<MatrixD> eigen(few.moment);
  few.latent.row(0) = eigen.eigenvectors().col(3).transpose();
  Sample unseen = many;
  unseen.latent = few.latent;
  const NormCompletion norm = complete_norm(few.latent, few.inputs, few.moment, 20);
  EXPECT_LE(squares(norm, unseen).maxCoeff(), 1e4);
}

// Words come again and again: 120 different inputs in 128 dimensions have a linear map to exactly 1, which is
// far from 1 on others.
TEST(NormCompletion, HoldsOnTokensOfOtherWords) {
  constexpr Index hidden = 128;
  constexpr Index words = 120;
  Random random(7);
  MatrixF vocabulary = MatrixF::Zero(3 * words, hidden + 1);
  vocabulary.leftCols(hidden) = testing_support::sample_inputs(random, 3 * words, hidden);
  vocabulary.leftCols(hidden).rowwise().normalize();
  vocabulary *= std::sqrt(static_cast<float>(hidden));
  Sample few = sample_of(7, 600, hidden, 112);
  for (Index i = 0; i < few.inputs.rows(); ++i) {
    // Either half has words of its own, as documents have.
    few.inputs.row(i) = vocabulary.row(i < 300 ? i % 80 : 40 + i % 80);
  }
  const MatrixD x = few.inputs.cast<double>();
  few.moment = x.transpose() * x / static_cast<double>(x.rows());
  const NormCompletion norm = complete_norm(few.latent, few.inputs, few.moment, 16);
  Sample unseen = few;
  unseen.inputs = vocabulary.bottomRows(2 * words);
  const VectorD rho_squared = squares(norm, unseen);
  EXPECT_LE(rho_squared.maxCoeff(), 2);
  EXPECT_GE(rho_squared.minCoeff(), 0.4);
}

TEST(NormCompletion, DeadCoordinatesDoNoHarm) {
  Sample sample = sample_of(5);
  sample.latent.row(2).setZero();
  // More directions than the inputs have.
  const NormCompletion norm = complete_norm(sample.latent, sample.inputs, sample.moment, 30);
  EXPECT_GT(norm.square(2), 0);
  EXPECT_LE(norm.square(2), norm.square.maxCoeff());
  // The nearest map to 1, then the twenty there are.
  EXPECT_TRUE(norm.extra.bottomRows(9).isZero(0));
  EXPECT_TRUE(norm.square.allFinite());
  EXPECT_TRUE(inverse_norm(norm, sample.latent, sample.inputs).allFinite());
}

}  // namespace
}  // namespace relatent
