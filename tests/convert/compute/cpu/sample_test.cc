#include "convert/compute/cpu/sample.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/support/fit_sample.h"

namespace relatent {
namespace {

using testing_support::fit_sample;
using testing_support::fit_sample_options;
using testing_support::FitSample;
using testing_support::FitSampleOptions;
using testing_support::name_of;
using testing_support::same;
using testing_support::sequences_of;
using testing_support::source_scores;
using testing_support::truncated;

TEST(AttentionSample, PositionsCoverTheSequence) {
  AttentionSample sample;
  sample.length = 11;
  sample.stride = 4;
  ASSERT_EQ(sample.per_sequence(), 2);
  const std::vector<std::vector<Index>> expected = {{0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 4}};
  for (Index s = 0; s < 5; ++s) {
    for (Index i = 0; i < 2; ++i) {
      EXPECT_EQ(sample.position(s, i), expected[static_cast<std::size_t>(s)][static_cast<std::size_t>(i)]);
    }
  }
}

TEST(MeasureValueSpread, IsTheVarianceOfWhatValuesAdd) {
  for (const FitSampleOptions& options : fit_sample_options) {
    SCOPED_TRACE(name_of(options));
    const FitSample fit = fit_sample(1, options);
    const AttentionSample& sample = fit.sample;
    ASSERT_EQ(sample.value_spread.size(), 4);
    // Every fourth sequence is asked.
    const std::vector<Index> sequences = sequences_of(sample, 4);
    for (Index h = 0; h < 4; ++h) {
      const MatrixD o = fit.layer.maps.output_of(h);
      double expected = 0;
      for (const Index s : sequences) {
        for (Index i = 0; i < sample.per_sequence(); ++i) {
          const VectorD weights = testing_support::softmax(source_scores(sample, s, h, i));
          const MatrixD added =
              o *
              fit.values.block(s * sample.length, h / 2 * 4, weights.size(), 4).cast<double>().transpose();
          const VectorD mean = added * weights;
          expected += weights.dot((added.colwise() - mean).colwise().squaredNorm().transpose());
        }
      }
      expected /= static_cast<double>(static_cast<Index>(sequences.size()) * sample.per_sequence());
      EXPECT_GT(expected, 0.01);
      EXPECT_NEAR(sample.value_spread(h) / expected, 1, 1e-4) << h;
    }
  }
}

TEST(KeepWeights, ChangesNothingButTime) {
  const FitSampleOptions options{.count = 5, .length = 70, .stride = 2, .drift = 0.2};
  const auto fitted = [&](std::size_t bytes, bool kept) {
    FitSample fit = fit_sample(27, options);
    EXPECT_TRUE(fit.sample.weights.empty());
    keep_weights(fit.sample, bytes);
    EXPECT_EQ(fit.sample.weights.empty(), !kept);
    measure_value_spread(fit.values, fit.layer.attention.o.weight, fit.sample);
    AbsorbedAttention attention = truncated(fit);
    fit_attention(fit.sample, {}, attention);
    return attention;
  };
  // A sequence takes 4 heads times 35 queries times up to 70 keys.
  const AbsorbedAttention without = fitted(1000, false);
  EXPECT_TRUE(same(fitted(10'000'000, true), without));
}

}  // namespace
}  // namespace relatent
