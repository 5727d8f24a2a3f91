#include "convert/latent/published_slices.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/products.h"
#include "linalg/decompose.h"
#include "tests/support/latents.h"

namespace relatent {
namespace {

using testing_support::kFloatNoise;
using testing_support::output_by_the_book;
using testing_support::output_of;
using testing_support::Random;
using testing_support::random_latent;
using testing_support::relative_error;
using testing_support::sample_inputs;
using testing_support::with_ones;

TEST(OrderName, NamesEveryOrder) {
  EXPECT_EQ(order_name(LatentOrder::shared), "shared");
  EXPECT_EQ(order_name(LatentOrder::pca), "pca");
  EXPECT_EQ(order_name(LatentOrder::hadamard), "hadamard");
}

TEST(EvenRotation, IsOrthogonal) {
  for (const Index size : {1, 2, 3, 5, 6, 7, 8, 12, 16, 20, 24, 64, 96}) {
    const MatrixD turn = hadamard_rotation(size);
    EXPECT_LE(relative_error(turn * turn.transpose(), MatrixD::Identity(size, size)), 1e-13) << size;
    // No entry is larger than those of a cosine basis.
    EXPECT_LE(turn.cwiseAbs().maxCoeff(), std::sqrt(2.0 / static_cast<double>(size)) + 1e-15) << size;
  }
}

TEST(EvenRotation, OfAPowerOfTwoIsFlat) {
  for (const Index size : {1, 2, 4, 8, 64, 128}) {
    const MatrixD turn = hadamard_rotation(size);
    const double entry = 1 / std::sqrt(static_cast<double>(size));
    EXPECT_NEAR(turn.cwiseAbs().minCoeff(), entry, 1e-15) << size;
    EXPECT_NEAR(turn.cwiseAbs().maxCoeff(), entry, 1e-15) << size;
  }
}

// An MLA layer, its inputs and their moments.
struct Sliceable {
  LatentAttention layer;
  MatrixF x;
  MatrixD moment;
  MatrixD query_moment;
};

MatrixD moment_of(const MatrixF& rows) {
  const MatrixD columns = with_ones(rows);
  return columns * columns.transpose() / static_cast<double>(rows.rows());
}

Sliceable sliceable(std::uint32_t seed, Index rank, LatentNorm norm, bool bias) {
  Random random(seed);
  Sliceable out;
  out.layer = random_latent(
      random,
      {.name = "", .form = "mla", .branches = 1, .rank = rank, .bias = bias, .norm = norm, .q_rank = 9}, 24);
  out.x = sample_inputs(random, 50, 24);
  out.moment = moment_of(out.x);
  out.query_moment = moment_of(query_features(out.layer, out.x));
  return out;
}

// Columns of the turn that each slice has.
std::vector<MatrixD> slices_by_the_book(const Sliceable& sample, Index parts, LatentOrder order) {
  const MatrixF latents = product(sample.layer.branches[0].down, sample.x);
  const Index rank = latents.cols();
  const MatrixD c = latents.cast<double>();
  const MatrixD turn =
      order == LatentOrder::pca ? symmetric_eigenpairs(c.transpose() * c).vectors : hadamard_rotation(rank);
  std::vector<MatrixD> out;
  for (Index b = 0; b < parts; ++b) {
    std::vector<Index> which;
    for (Index i = 0; i < rank; ++i) {
      if (order == LatentOrder::pca ? i % parts == b : i >= b * rank / parts && i < (b + 1) * rank / parts) {
        which.push_back(i);
      }
    }
    out.emplace_back(turn(Eigen::all, which));
  }
  return out;
}

TEST(SliceLatent, OnePartIsTheWhole) {
  for (const LatentOrder order : {LatentOrder::pca, LatentOrder::hadamard}) {
    for (const LatentNorm norm : {LatentNorm::none, LatentNorm::branch}) {
      for (const bool bias : {false, true}) {
        for (const Index rank : {7, 8}) {
          SCOPED_TRACE(std::string(order_name(order)) + (norm == LatentNorm::branch ? " norm" : "") +
                       (bias ? " bias" : ""));
          const Sliceable sample = sliceable(1, rank, norm, bias);
          const LatentAttention sliced =
              slice_latent(sample.layer, 1, order, sample.moment, sample.query_moment);
          ASSERT_EQ(sliced.branches.size(), 1U);
          EXPECT_EQ(sliced.branches[0].norm.present(), norm == LatentNorm::branch);
          EXPECT_FALSE(relative_error(sliced.branches[0].down.weight, sample.layer.branches[0].down.weight) <
                       0.1);
          EXPECT_LE(relative_error(output_of(sliced, sample.x), output_by_the_book(sample.layer, sample.x)),
                    kFloatNoise);
        }
      }
    }
  }
}

TEST(SliceLatent, SlicesDivideTheTurnedLatent) {
  for (const LatentOrder order : {LatentOrder::pca, LatentOrder::hadamard}) {
    for (const Index parts : {2, 3, 4}) {
      SCOPED_TRACE(std::string(order_name(order)) + " " + std::to_string(parts));
      const Sliceable sample = sliceable(2, 7, LatentNorm::none, true);
      const LatentBranch& whole = sample.layer.branches[0];
      const LatentAttention sliced =
          slice_latent(sample.layer, parts, order, sample.moment, sample.query_moment);
      const std::vector<MatrixD> slices = slices_by_the_book(sample, parts, order);
      ASSERT_EQ(sliced.branches.size(), slices.size());
      EXPECT_EQ(sliced.total_rank(), 7);
      const Index n = sliced.nope_dim;
      const Index w = sliced.v_dim;
      for (std::size_t b = 0; b < slices.size(); ++b) {
        const LatentBranch& branch = sliced.branches[b];
        EXPECT_EQ(branch.first_head, 0);
        EXPECT_EQ(branch.head_count, 6);
        EXPECT_FALSE(branch.shared);
        EXPECT_FALSE(branch.norm.present());
        EXPECT_LE(
            relative_error(branch.down.weight, slices[b].transpose() * whole.down.weight.cast<double>()),
            kFloatNoise);
        EXPECT_LE(relative_error(branch.down.bias, whole.down.bias.cast<double>() * slices[b]), kFloatNoise);
        for (Index h = 0; h < 6; ++h) {
          const Index row = h * (n + w) + n;
          EXPECT_LE(relative_error(branch.up.middleRows(row, w),
                                   whole.up.middleRows(row, w).cast<double>() * slices[b]),
                    kFloatNoise);
        }
      }
    }
  }
}

// Σ_h E[s_h s_hb] / Σ_h E[s_hb²] over every query and every key, s_hb being the scores of a slice alone.
double gain_by_the_book(const Sliceable& sample, const MatrixD& slice) {
  const LatentAttention& a = sample.layer;
  const Index n = a.nope_dim;
  const MatrixD queries = product(a.q, query_features(a, sample.x)).cast<double>();
  MatrixD latents = product(a.branches[0].down, sample.x).cast<double>();
  // What is the same for all keys cancels in the softmax.
  latents.rowwise() -= latents.colwise().mean().eval();
  double together = 0;
  double alone = 0;
  for (Index h = 0; h < a.heads; ++h) {
    MatrixD up = a.branches[0].up.middleRows(h * (n + a.v_dim), n).cast<double>();
    if (a.branches[0].norm.present()) {
      up = (up * a.branches[0].norm.gain.transpose().cast<double>().asDiagonal()).eval();
    }
    const MatrixD asked = queries.middleCols(h * (n + a.rope_dim), n) * up;
    const MatrixD whole = asked * latents.transpose();
    const MatrixD part = asked * slice * slice.transpose() * latents.transpose();
    together += whole.cwiseProduct(part).sum();
    alone += part.squaredNorm();
  }
  return together / alone;
}

TEST(SliceLatent, ScoresOfASliceComeNearestToTheWhole) {
  for (const LatentOrder order : {LatentOrder::pca, LatentOrder::hadamard}) {
    for (const LatentNorm norm : {LatentNorm::none, LatentNorm::branch}) {
      for (const Index parts : {2, 3}) {
        SCOPED_TRACE(std::string(order_name(order)) + " " + std::to_string(parts));
        const Sliceable sample = sliceable(3, 8, norm, true);
        const LatentAttention sliced =
            slice_latent(sample.layer, parts, order, sample.moment, sample.query_moment);
        const std::vector<MatrixD> slices = slices_by_the_book(sample, parts, order);
        const Index n = sliced.nope_dim;
        const Index w = sliced.v_dim;
        for (std::size_t b = 0; b < slices.size(); ++b) {
          const double beta = gain_by_the_book(sample, slices[b]);
          EXPECT_GT(std::abs(beta - 1), 1e-3);
          for (Index h = 0; h < 6; ++h) {
            MatrixD keys = sample.layer.branches[0].up.middleRows(h * (n + w), n).cast<double>();
            if (norm == LatentNorm::branch) {
              keys =
                  (keys * sample.layer.branches[0].norm.gain.transpose().cast<double>().asDiagonal()).eval();
            }
            EXPECT_LE(
                relative_error(sliced.branches[b].up.middleRows(h * (n + w), n), beta * keys * slices[b]),
                10 * kFloatNoise);
          }
        }
      }
    }
  }
}

// Slices that all say the same: each of k has a k-th of the scores, and nothing is lost.
TEST(SliceLatent, IdenticalSlicesLoseNothing) {
  for (const Index parts : {2, 4}) {
    Sliceable sample = sliceable(4, 8, LatentNorm::none, true);
    Random random(5);
    const Index own = 8 / parts;
    LatentBranch& branch = sample.layer.branches[0];
    const MatrixD turn = hadamard_rotation(8);
    const MatrixD down = random.matrix_d(own, 24) / 5;
    const MatrixD bias = random.matrix_d(own, 1);
    const MatrixD up = random.matrix_d(branch.up.rows(), own) / 4;
    branch.down.weight = (turn * down.replicate(parts, 1)).cast<float>();
    branch.down.bias = (turn * bias.replicate(parts, 1)).transpose().cast<float>();
    branch.up = (up.replicate(1, parts) * turn.transpose()).cast<float>();
    const LatentAttention sliced =
        slice_latent(sample.layer, parts, LatentOrder::hadamard, sample.moment, sample.query_moment);
    const Index n = sliced.nope_dim;
    const Index w = sliced.v_dim;
    for (const LatentBranch& slice : sliced.branches) {
      EXPECT_LE(relative_error(slice.down.weight, down), kFloatNoise);
      for (Index h = 0; h < 6; ++h) {
        EXPECT_LE(relative_error(slice.up.middleRows(h * (n + w), n),
                                 static_cast<double>(parts) * up.middleRows(h * (n + w), n)),
                  kFloatNoise);
        EXPECT_LE(relative_error(slice.up.middleRows(h * (n + w) + n, w), up.middleRows(h * (n + w) + n, w)),
                  kFloatNoise);
      }
    }
    EXPECT_LE(relative_error(output_of(sliced, sample.x), output_by_the_book(sample.layer, sample.x)),
              kFloatNoise);
  }
}

TEST(SliceLatent, NormsMakeGoodForTheEnergyOfASlice) {
  for (const LatentOrder order : {LatentOrder::pca, LatentOrder::hadamard}) {
    for (const Index parts : {2, 3}) {
      SCOPED_TRACE(std::string(order_name(order)) + " " + std::to_string(parts));
      const Sliceable sample = sliceable(6, 7, LatentNorm::branch, false);
      const LatentAttention sliced =
          slice_latent(sample.layer, parts, order, sample.moment, sample.query_moment);
      const std::vector<MatrixD> slices = slices_by_the_book(sample, parts, order);
      const MatrixD latents = product(sample.layer.branches[0].down, sample.x).cast<double>();
      double together = 0;
      for (std::size_t b = 0; b < slices.size(); ++b) {
        const RmsNorm& norm = sliced.branches[b].norm;
        const auto size = static_cast<double>(slices[b].cols());
        const double gain =
            std::sqrt((latents * slices[b]).squaredNorm() * 7 / (latents.squaredNorm() * size));
        ASSERT_EQ(norm.gain.size(), slices[b].cols());
        EXPECT_EQ(norm.eps, sample.layer.branches[0].norm.eps);
        EXPECT_EQ(norm.gain.minCoeff(), norm.gain.maxCoeff());
        EXPECT_NEAR(static_cast<double>(norm.gain(0)) / gain, 1, kFloatNoise);
        EXPECT_GT(std::abs(gain - 1), 1e-3);
        together += gain * gain * size;
      }
      EXPECT_NEAR(together / 7, 1, 1e-12);
    }
  }
}

TEST(SliceLatent, SlicesNoLayerOfSeveralLatents) {
  Random random(7);
  const MatrixD moment = MatrixD::Identity(25, 25);
  for (const testing_support::LatentSample& sample :
       {testing_support::LatentSample{.name = "", .form = "gla"},
        testing_support::LatentSample{.name = "", .form = "tpla"}}) {
    EXPECT_THROW(slice_latent(random_latent(random, sample, 24), 2, LatentOrder::pca, moment, moment),
                 std::logic_error);
  }
}

}  // namespace
}  // namespace relatent
