#include "convert/latent/query_rank.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <cmath>
#include <stdexcept>

#include "convert/compute/cpu/products.h"
#include "tests/support/latents.h"

namespace relatent {
namespace {

using testing_support::kFloatNoise;
using testing_support::output_of;
using testing_support::Random;
using testing_support::random_latent;
using testing_support::relative_error;
using testing_support::sample_inputs;
using testing_support::with_ones;

constexpr Index hidden = 24;

struct Sample {
  LatentAttention layer;
  MatrixF x;
  MatrixD moment;
};

Sample sample_of(std::uint32_t seed, Index tokens = 200, bool bias = true) {
  Random random(seed);
  Sample out;
  out.layer = random_latent(random, {.name = "", .form = "gla", .bias = bias}, hidden);
  // A rotary key that scores hear more of than of the content, some pairs more than others.
  for (Index i = 0; i < 3; ++i) {
    out.layer.rotary_key.weight.row(i) *= static_cast<float>(1 + 3 * i);
    out.layer.rotary_key.weight.row(i + 3) *= 0.5F;
  }
  out.x = sample_inputs(random, tokens, hidden);
  const MatrixD columns = with_ones(out.x);
  out.moment = columns * columns.transpose() / static_cast<double>(tokens);
  return out;
}

// √ of the weight of every row of q: content meets keys of mean square 1, a pair of rotary rows the rotary
// key's two, which the rotation mixes.
VectorD weights(const Sample& sample) {
  const LatentAttention& a = sample.layer;
  const MatrixD key = sample.x.cast<double>() * a.rotary_key.weight.cast<double>().transpose();
  VectorD out(a.q.out());
  for (Index row = 0; row < out.size(); ++row) {
    const Index i = row % (a.nope_dim + a.rope_dim) - a.nope_dim;
    const Index pair = i % (a.rope_dim / 2);
    out(row) = i < 0
                   ? 1
                   : std::sqrt((key.col(pair).squaredNorm() + key.col(pair + a.rope_dim / 2).squaredNorm()) /
                               static_cast<double>(2 * key.rows()));
  }
  return out;
}

// E‖W (q - q') x‖² over the tokens themselves.
double error_of(const Sample& sample, const MatrixD& other) {
  const MatrixD difference = sample.layer.q.weight.cast<double>() - other;
  return (weights(sample).asDiagonal() * difference * sample.x.cast<double>().transpose()).squaredNorm() /
         static_cast<double>(sample.x.rows());
}

MatrixD product_of(const LatentAttention& a) {
  return a.q.weight.cast<double>() * a.q_down.weight.cast<double>();
}

TEST(QueryRank, FullRankIsExact) {
  for (const Index tokens : {200, 10}) {
    const Sample sample = sample_of(1, tokens);
    LatentAttention compressed = sample.layer;
    compress_query(compressed, sample.moment, hidden);
    EXPECT_EQ(compressed.q_down.out(), hidden);
    EXPECT_LE(relative_error(output_of(compressed, sample.x), output_of(sample.layer, sample.x)),
              10 * kFloatNoise)
        << tokens;
  }
  // Ten tokens span no more.
  const Sample few = sample_of(1, 10);
  LatentAttention compressed = few.layer;
  compress_query(compressed, few.moment, 10);
  EXPECT_LE(relative_error(output_of(compressed, few.x), output_of(few.layer, few.x)), 10 * kFloatNoise);
}

// More coordinates than rows of q.
TEST(QueryRank, QueriesOfFewRows) {
  Sample sample = sample_of(2);
  LatentAttention& layer = sample.layer;
  layer.q = layer.q.rows(0, 11);
  layer.heads = 1;
  LatentAttention compressed = layer;
  compress_query(compressed, sample.moment, 20);
  EXPECT_TRUE(compressed.q_down.weight.allFinite());
  EXPECT_LE(relative_error(product_of(compressed), layer.q.weight), 10 * kFloatNoise);
}

TEST(QueryRank, IsTheBestOfItsRank) {
  const Sample sample = sample_of(3);
  const MatrixD q = sample.layer.q.weight.cast<double>();
  const MatrixD x = sample.x.cast<double>();
  const VectorD w = weights(sample);
  const Eigen::BDCSVD<MatrixD> svd(w.asDiagonal() * q * x.transpose() / std::sqrt(200.0));
  const Eigen::BDCSVD<MatrixD> plain(q, Eigen::ComputeThinU | Eigen::ComputeThinV);
  double before = INFINITY;
  for (const Index rank : {2, 7, 16, 23}) {
    SCOPED_TRACE(rank);
    LatentAttention compressed = sample.layer;
    compress_query(compressed, sample.moment, rank);
    EXPECT_EQ(compressed.q_down.weight.rows(), rank);
    EXPECT_EQ(compressed.q_down.weight.cols(), hidden);
    EXPECT_EQ(compressed.q.weight.cols(), rank);
    const double found = error_of(sample, product_of(compressed));
    const double expected = svd.singularValues().tail(svd.singularValues().size() - rank).squaredNorm();
    EXPECT_NEAR(found / expected, 1, 1e-4);
    EXPECT_LT(found, before);
    before = found;
    const MatrixD truncated = plain.matrixU().leftCols(rank) *
                              plain.singularValues().head(rank).asDiagonal() *
                              plain.matrixV().leftCols(rank).transpose();
    EXPECT_LT(found, error_of(sample, truncated));
    Random random(4);
    for (int i = 0; i < 20; ++i) {
      // Half of them near the one found; each with the best second map there is for its first.
      MatrixD down = random.matrix_d(rank, hidden);
      if (i % 2 == 0) {
        down = compressed.q_down.weight.cast<double>() + 0.1 * down;
      }
      const MatrixD z = down * x.transpose();
      const MatrixD up = (z * z.transpose()).ldlt().solve(z * x * q.transpose()).transpose();
      EXPECT_LE(found, error_of(sample, up * down) * (1 + 1e-5)) << i;
    }
  }
}

TEST(QueryRank, TheRestStays) {
  const Sample sample = sample_of(5);
  LatentAttention compressed = sample.layer;
  compress_query(compressed, sample.moment, 9);
  ASSERT_GT(sample.layer.q.bias.size(), 0);
  EXPECT_TRUE(compressed.q.bias == sample.layer.q.bias);
  EXPECT_EQ(compressed.q_down.bias.size(), 0);
  EXPECT_FALSE(compressed.q_norm.present());
  EXPECT_TRUE(compressed.rotary_key.weight == sample.layer.rotary_key.weight);
  const MatrixF z = product(compressed.q_down, sample.x);
  EXPECT_NEAR(compressed.q_mean_square, static_cast<double>(z.squaredNorm()) / static_cast<double>(z.size()),
              1e-4 * compressed.q_mean_square);
  EXPECT_EQ(compressed.scale, sample.layer.scale);
}

TEST(QueryRank, BadRanksAreRefused) {
  const Sample sample = sample_of(6);
  for (const Index rank : {-1, 0, 25}) {
    LatentAttention layer = sample.layer;
    EXPECT_THROW(compress_query(layer, sample.moment, rank), std::invalid_argument) << rank;
    EXPECT_TRUE(layer.q.weight == sample.layer.q.weight);
  }
  LatentAttention layer = sample.layer;
  compress_query(layer, sample.moment, 20);
  EXPECT_THROW(compress_query(layer, sample.moment, 10), std::invalid_argument);
}

}  // namespace
}  // namespace relatent
