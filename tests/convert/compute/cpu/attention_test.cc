#include "convert/compute/cpu/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "convert/compute/cpu/products.h"
#include "tests/support/reference.h"
#include "tests/support/samples.h"

namespace relatent {
namespace {

using testing_support::apply;
using testing_support::gqa_samples;
using testing_support::GqaSample;
using testing_support::kFloatNoise;
using testing_support::mix_by_the_book;
using testing_support::Random;
using testing_support::relative_error;
using testing_support::sample_inputs;
using testing_support::sample_rotary;

constexpr double kFloatEpsilon = std::numeric_limits<float>::epsilon();

TEST(Linear, IsAnAffineMap) {
  Random random(1);
  const MatrixF x = random.matrix(9, 5);
  for (const bool bias : {false, true}) {
    const Linear linear = random.linear(7, 5, bias);
    EXPECT_EQ(linear.out(), 7);
    const MatrixF y = product(linear, x);
    MatrixD expected(9, 7);
    for (Index n = 0; n < x.rows(); ++n) {
      expected.row(n) = apply(linear, testing_support::position_of(x, n)).transpose();
    }
    EXPECT_LE(relative_error(y, expected), 8 * kFloatEpsilon);
  }
  EXPECT_EQ(Linear().out(), 0);
}

TEST(RmsNorm, DividesByTheRootMeanSquare) {
  Random random(2);
  RmsNorm norm{random.row(13), 1e-3F};
  // Rows of very different size: eps decides the small ones.
  MatrixF x = random.matrix(5, 13);
  x.row(1) *= 1e-3F;
  x.row(2) *= 1e4F;
  x.row(3).setZero();
  MatrixF y = x;
  normalise(norm, y);
  for (Index n = 0; n < x.rows(); ++n) {
    const VectorD expected = apply(norm, testing_support::position_of(x, n));
    EXPECT_LE((y.row(n).transpose().cast<double>() - expected).norm(), 16 * kFloatEpsilon * expected.norm())
        << n;
  }
  EXPECT_TRUE(norm.present());
  EXPECT_FALSE(RmsNorm().present());
}

TEST(GqaAttention, MixesHeadsByTheBook) {
  std::vector<GqaSample> samples = gqa_samples();
  samples.push_back({.name = "window", .q_bias = true, .window = 7});
  samples.push_back({.name = "only itself", .window = 1});
  samples.push_back({.name = "capped scores", .softcap = 0.7F});
  samples.push_back({.name = "capped scores in a window", .window = 7, .softcap = 0.7F});
  samples.push_back({.name = "window beyond the sequence", .window = 1000});
  for (const GqaSample& sample : samples) {
    // 200 positions are more than are handled at once.
    for (const Index length : {1, 2, 40, 200}) {
      if (length == 200 && sample.window != 7 && sample.name != "all biases") {
        continue;
      }
      SCOPED_TRACE(sample.name + " over " + std::to_string(length));
      Random random(3);
      const GqaAttention attention = testing_support::random_gqa(random, sample);
      const MatrixF x = sample_inputs(random, length, sample.hidden);
      const RotaryTable table(attention.rotary, length + 3);
      AttentionSums expected_sums(sample.heads, length);
      const MatrixD expected = mix_by_the_book(attention, x, &expected_sums);
      const std::vector<MatrixF> roots = output_roots(attention);
      AttentionSums sums(sample.heads, length, &roots);
      const MatrixF found = attention_forward(attention, x, table, &sums);
      EXPECT_LE(relative_error(found, expected), kFloatNoise);
      EXPECT_TRUE(attention_forward(attention, x, table) == found);
      EXPECT_TRUE(attention_forward(Attention(attention), x, table) == found);

      EXPECT_LE(relative_error(sums.distance_mass, expected_sums.distance_mass), kFloatNoise);
      EXPECT_LE(relative_error(sums.received, expected_sums.received), kFloatNoise);
      EXPECT_LE(relative_error(sums.mass_square, expected_sums.mass_square), kFloatNoise);
      if (sample.window == 1 || length == 1) {
        // Every query sees one value, and an error of its score does nothing.
        const double values = project(attention, x, table).v.cast<double>().squaredNorm();
        EXPECT_LE(sums.score_effect.maxCoeff(),
                  kFloatNoise * attention.o.weight.cast<double>().squaredNorm() * values);
      } else {
        EXPECT_LE(relative_error(sums.score_effect, expected_sums.score_effect), 10 * kFloatNoise);
      }
      EXPECT_NEAR(sums.received.sum(), static_cast<double>(length * sample.heads),
                  static_cast<double>(length * sample.heads) * kFloatNoise);
      if (sample.window && *sample.window < length) {
        EXPECT_TRUE(sums.distance_mass.rightCols(length - *sample.window).isZero(0));
      }
      attention_forward(attention, x, table, &sums);
      EXPECT_LE(relative_error(sums.received, 2 * expected_sums.received), kFloatNoise);
    }
  }
}

// A norm on heads is that of every head's numbers, or of all of them, before they turn.
TEST(GqaAttention, NormalisesQueriesAndKeysBeforeTheRotation) {
  Random random(30);
  GqaAttention attention = testing_support::random_gqa(random, gqa_samples().front());
  const Index d = attention.head_dim;
  const MatrixF x = sample_inputs(random, 20, attention.q.weight.cols());
  const RotaryTable table(attention.rotary, 20);
  const GqaProjections plain = project_unrotated(attention, x);
  for (const bool wide : {false, true}) {
    SCOPED_TRACE(wide);
    attention.q_norm = {random.row(wide ? attention.heads * d : d), 1e-3F};
    attention.k_norm = {random.row(wide ? attention.kv_heads * d : d), 1e-3F};
    GqaProjections expected = plain;
    for (const auto& [norm, rows] :
         {std::pair{&attention.q_norm, &expected.q}, std::pair{&attention.k_norm, &expected.k}}) {
      const Index size = norm->gain.size();
      for (Index first = 0; first < rows->cols(); first += size) {
        MatrixF run = rows->middleCols(first, size);
        normalise(*norm, run);
        rows->middleCols(first, size) = run;
      }
    }
    const GqaProjections unrotated = project_unrotated(attention, x);
    EXPECT_LE(relative_error(unrotated.q, expected.q), kFloatNoise);
    EXPECT_LE(relative_error(unrotated.k, expected.k), kFloatNoise);
    EXPECT_TRUE(unrotated.v == plain.v);
    GqaProjections turned = unrotated;
    rotate(attention, table, turned);
    const GqaProjections found = project(attention, x, table);
    EXPECT_TRUE(found.q == turned.q && found.k == turned.k);
    EXPECT_TRUE(attention_forward(attention, x, table) == attention_forward(attention, found));
    // Longer keys are the same keys.
    GqaAttention longer = attention;
    longer.k.weight *= 64;
    longer.k.bias *= 64;
    longer.k_norm.eps = 0;
    attention.k_norm.eps = 0;
    EXPECT_LE(relative_error(attention_forward(longer, x, table), attention_forward(attention, x, table)),
              kFloatNoise);
  }
}

TEST(GqaAttention, LaterPositionsChangeNothingBefore) {
  Random random(4);
  const GqaAttention attention = testing_support::random_gqa(random, {});
  MatrixF x = sample_inputs(random, 30, 24);
  const RotaryTable table(attention.rotary, 30);
  const MatrixF before = attention_forward(attention, x, table);
  x.bottomRows(10) = random.matrix(10, 24);
  const MatrixF after = attention_forward(attention, x, table);
  EXPECT_TRUE(after.topRows(20) == before.topRows(20));
  EXPECT_GT(relative_error(after.bottomRows(10), before.bottomRows(10)), 0.1);
}

TEST(GqaAttention, SurvivesScoresThatOverflowTheExponential) {
  Random random(5);
  GqaAttention attention = testing_support::random_gqa(random, {});
  attention.scale = 200;
  const MatrixF x = sample_inputs(random, 20, 24);
  const MatrixF found = attention_forward(attention, x, RotaryTable(attention.rotary, 20));
  EXPECT_TRUE(found.allFinite());
  // Scores of about a thousand carry float32 errors of about 1e-4.
  EXPECT_LE(relative_error(found, mix_by_the_book(attention, x)), 1e-2);
}

struct LatentSample {
  std::string name;
  Index nope_dim = 5;
  Index q_rank = 0;
  bool q_norm = false;
  bool bias = false;
  bool norm = false;
  // Heads first ... last - 1 of each branch.
  std::vector<std::pair<Index, Index>> branches = {{0, 4}};
};

LatentAttention random_latent(Random& random, const LatentSample& sample) {
  const Index hidden = 14;
  LatentAttention out;
  out.heads = 4;
  out.nope_dim = sample.nope_dim;
  out.rope_dim = 6;
  out.v_dim = 3;
  out.scale = 0.4F;
  const auto gain = [&](Index size) { return RowVectorF(random.row(size, 0.3).array() + 1.0F); };
  if (sample.q_rank > 0) {
    out.q_down = random.linear(sample.q_rank, hidden, sample.bias);
    if (sample.q_norm) {
      out.q_norm = {gain(sample.q_rank), 1e-2F};
    }
  }
  out.q = random.linear(out.heads * (out.nope_dim + out.rope_dim), sample.q_rank > 0 ? sample.q_rank : hidden,
                        sample.bias);
  out.rotary_key = random.linear(out.rope_dim, hidden, sample.bias);
  Index rank = 9;
  for (const auto& [first, last] : sample.branches) {
    LatentBranch branch;
    branch.down = random.linear(rank, hidden, sample.bias);
    if (sample.norm) {
      branch.norm = {gain(rank), 1e-2F};
    }
    branch.first_head = first;
    branch.head_count = last - first;
    branch.up = random.matrix(branch.head_count * (out.nope_dim + out.v_dim), rank, 0.5);
    out.branches.push_back(std::move(branch));
    rank -= 2;
  }
  out.o = random.linear(hidden, out.heads * out.v_dim, sample.bias);
  out.rotary = sample_rotary(out.rope_dim, 1.1F);
  return out;
}

TEST(LatentAttention, MixesHeadsByTheBook) {
  const std::vector<LatentSample> samples = {
      {.name = "plain"},
      {.name = "no content", .nope_dim = 0},
      {.name = "biases", .bias = true},
      {.name = "norm on the latent", .norm = true},
      {.name = "low-rank query", .q_rank = 7, .bias = true},
      {.name = "normed low-rank query", .q_rank = 7, .q_norm = true},
      {.name = "two branches that all heads read", .bias = true, .norm = true, .branches = {{0, 4}, {0, 4}}},
      {.name = "two branches with their own heads", .bias = true, .branches = {{0, 1}, {1, 4}}},
      {.name = "branches that overlap", .q_rank = 5, .q_norm = true, .branches = {{0, 3}, {2, 4}}},
  };
  for (const LatentSample& sample : samples) {
    for (const Index length : {1, 33, 150}) {
      SCOPED_TRACE(sample.name + " over " + std::to_string(length));
      Random random(6);
      const LatentAttention attention = random_latent(random, sample);
      const MatrixF x = sample_inputs(random, length, 14);
      const RotaryTable table(attention.rotary, length);
      const MatrixF found = attention_forward(attention, x, table);
      EXPECT_LE(relative_error(found, mix_by_the_book(attention, x)), kFloatNoise);
      EXPECT_TRUE(attention_forward(Attention(attention), x, table) == found);
      EXPECT_EQ(attention.total_rank(), sample.branches.size() == 1 ? 9 : 9 + 7);
    }
  }
}

TEST(Attention, PartsOfEitherKind) {
  Random random(7);
  const Attention gqa = testing_support::random_gqa(random, {.o_bias = true, .attention_factor = 1.5F});
  const Attention latent = random_latent(random, {.name = "", .bias = true});
  EXPECT_TRUE(output_projection(gqa).weight == std::get<GqaAttention>(gqa).o.weight);
  EXPECT_TRUE(output_projection(latent).bias == std::get<LatentAttention>(latent).o.bias);
  EXPECT_EQ(rotary_of(gqa).attention_factor, 1.5F);
  EXPECT_EQ(rotary_of(latent).attention_factor, 1.1F);
  const auto& groups = std::get<GqaAttention>(gqa);
  for (Index h = 0; h < 6; ++h) {
    EXPECT_EQ(groups.group_of(h), h < 3 ? 0 : 1);
  }
}

}  // namespace
}  // namespace relatent
