#include "convert/latent/branch_norms.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <stdexcept>
#include <vector>

#include "convert/compute/cpu/products.h"
#include "tests/support/latents.h"

namespace relatent {
namespace {

using testing_support::kFloatNoise;
using testing_support::latent_samples;
using testing_support::LatentSample;
using testing_support::output_of;
using testing_support::Random;
using testing_support::random_latent;
using testing_support::relative_error;

constexpr Index hidden = 40;

struct Sample {
  LatentAttention layer;
  MatrixF inputs;  // x̃, ends in 0
  MatrixD moment;
};

Sample sample_of(const LatentSample& shape, std::uint32_t seed = 7, Index tokens = 300) {
  Random random(seed);
  Sample out;
  out.layer = random_latent(random, shape, hidden);
  out.inputs = MatrixF::Zero(tokens, hidden + 1);
  out.inputs.leftCols(hidden) = testing_support::sample_inputs(random, tokens, hidden);
  const MatrixD x = out.inputs.cast<double>();
  out.moment = x.transpose() * x / static_cast<double>(tokens);
  return out;
}

// Every form whose layer has neither a bias nor a norm, that of one latent too.
std::vector<LatentSample> plain_samples() {
  std::vector<LatentSample> out;
  for (LatentSample sample : latent_samples()) {
    sample.bias = false;
    sample.norm = LatentNorm::none;
    out.push_back(sample);
  }
  return out;
}

MatrixF latent_of(const LatentAttention& layer, const LatentBranch& branch, const MatrixF& x) {
  const MatrixF own = product(branch.down, x);
  const Index shared = branch.shared ? layer.shared[static_cast<std::size_t>(*branch.shared)].out() : 0;
  MatrixF out(x.rows(), shared + own.cols());
  if (shared > 0) {
    out.leftCols(shared) = product(layer.shared[static_cast<std::size_t>(*branch.shared)], x);
  }
  out.rightCols(own.cols()) = own;
  if (branch.norm.present()) {
    normalise(branch.norm, out);
  }
  return out;
}

// What a head reads is what it read before times 1/ρ, a number near 1 of the token alone.
TEST(BranchNorms, HeadsReadTheSameUpToOneNumber) {
  for (const LatentSample& shape : plain_samples()) {
    SCOPED_TRACE(shape.name);
    const Sample sample = sample_of(shape);
    const MatrixF x = sample.inputs.leftCols(hidden);
    double before = INFINITY;
    for (const Index extra : {0, 6, 30}) {
      LatentAttention normed = sample.layer;
      normalise_branches(normed, sample.inputs, sample.moment, extra);
      ASSERT_EQ(normed.branches.size(), sample.layer.branches.size());
      double miss = 0;
      for (std::size_t b = 0; b < normed.branches.size(); ++b) {
        const LatentBranch& was = sample.layer.branches[b];
        const LatentBranch& is = normed.branches[b];
        const MatrixD read = (latent_of(sample.layer, was, x) * was.up.transpose()).cast<double>();
        const MatrixD found = (latent_of(normed, is, x) * is.up.transpose()).cast<double>();
        const VectorD factor =
            found.cwiseProduct(read).rowwise().sum().cwiseQuotient(read.rowwise().squaredNorm());
        EXPECT_LE(relative_error(found, MatrixD(factor.asDiagonal() * read)), 1e-5);
        miss += (factor.array() - 1).square().mean();
      }
      miss = std::sqrt(miss / static_cast<double>(normed.branches.size()));
      EXPECT_LT(miss, before) << extra;
      before = miss;
    }
    // Thirty coordinates of unit variance beside the latent's: mean squares vary by some 0.2, roots by half.
    EXPECT_LE(before, 0.12);
    EXPECT_GT(before, 0.005);
  }
}

TEST(BranchNorms, OutputsStayNear) {
  for (const LatentSample& shape : plain_samples()) {
    SCOPED_TRACE(shape.name);
    const Sample sample = sample_of(shape);
    const MatrixF x = sample.inputs.leftCols(hidden);
    const MatrixF expected = output_of(sample.layer, x);
    std::vector<double> errors;
    for (const Index extra : {0, 30}) {
      LatentAttention normed = sample.layer;
      normalise_branches(normed, sample.inputs, sample.moment, extra);
      errors.push_back(relative_error(output_of(normed, x), expected));
    }
    EXPECT_LE(errors[1], 0.2);
    EXPECT_LT(errors[1], 0.8 * errors[0]);
  }
}

TEST(BranchNorms, SharedCoordinatesBecomeEveryBranchesOwn) {
  const LatentSample shape{.name = "", .form = "mlra", .branches = 2};
  const Sample sample = sample_of(shape);
  ASSERT_EQ(sample.layer.shared.size(), 2U);
  LatentAttention normed = sample.layer;
  normalise_branches(normed, sample.inputs, sample.moment, 5);
  EXPECT_TRUE(normed.shared.empty());
  for (std::size_t b = 0; b < normed.branches.size(); ++b) {
    const LatentBranch& is = normed.branches[b];
    const LatentBranch& was = sample.layer.branches[b];
    const Index whole = 3 + was.down.out();
    EXPECT_FALSE(is.shared);
    EXPECT_EQ(is.down.out(), whole + 5);
    EXPECT_EQ(is.down.bias.size(), 0);
    EXPECT_EQ(is.up.cols(), whole + 5);
    EXPECT_TRUE(is.up.rightCols(5).isZero(0));
    EXPECT_TRUE(is.norm.gain == RowVectorF::Ones(whole + 5));
    EXPECT_EQ(is.norm.eps, 1e-6F);
    EXPECT_EQ(is.first_head, was.first_head);
    // Row by row a multiple of the shared rows, then of its own.
    MatrixF rows(whole, hidden);
    rows << sample.layer.shared[static_cast<std::size_t>(*was.shared)].weight, was.down.weight;
    for (Index i = 0; i < whole; ++i) {
      const float factor = is.down.weight.row(i).dot(rows.row(i)) / rows.row(i).squaredNorm();
      EXPECT_GT(factor, 0);
      EXPECT_LE(relative_error(MatrixF(is.down.weight.row(i)), MatrixF(factor * rows.row(i))), kFloatNoise);
    }
  }
}

// Far above an engine's eps, far below the end of float16.
TEST(BranchNorms, StoredLatentsHaveAGoodSize) {
  const Sample sample = sample_of({.name = ""});
  LatentAttention normed = sample.layer;
  for (LatentBranch& branch : normed.branches) {
    branch.down.weight *= 1e-4F;
  }
  normalise_branches(normed, sample.inputs, sample.moment, 8);
  const MatrixF x = sample.inputs.leftCols(hidden);
  for (const LatentBranch& branch : normed.branches) {
    const MatrixF latent = product(branch.down, x);
    const double mean_square = static_cast<double>(latent.squaredNorm()) / static_cast<double>(latent.size());
    EXPECT_NEAR(mean_square, 256, 60);
    EXPECT_LE(latent.cwiseAbs().maxCoeff(), 1000);
  }
}

TEST(BranchNorms, ABiasIsRefused) {
  const std::vector<std::function<void(LatentAttention&)>> spoils = {
      [](LatentAttention& a) { a.branches[1].down.bias = RowVectorF::Ones(a.branches[1].down.out()); },
      [](LatentAttention& a) { a.shared[0].bias = RowVectorF::Ones(a.shared[0].out()); }};
  for (std::size_t i = 0; i < spoils.size(); ++i) {
    Sample sample = sample_of({.name = ""});
    spoils[i](sample.layer);
    EXPECT_THROW(normalise_branches(sample.layer, sample.inputs, sample.moment, 2), std::logic_error) << i;
  }
}

}  // namespace
}  // namespace relatent
