#include "convert/latent/attention_fit.h"

#include <gtest/gtest.h>

#include "linalg/decompose.h"
#include "linalg/packed.h"
#include "tests/support/fit_sample.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::fit_sample;
using testing_support::FitSample;
using testing_support::name_of;
using testing_support::output_error;
using testing_support::parted;
using testing_support::parted_cases;
using testing_support::PartedCase;
using testing_support::relative_error;
using testing_support::same;
using testing_support::score_error;
using testing_support::sequences_of;
using testing_support::ThreadCount;
using testing_support::truncated;

// x̃ ends in 0, so nothing may come to rest on what it would multiply.
TEST(AttentionFits, WithoutConstantsNoBiasChanges) {
  const FitSample fit =
      fit_sample(22, {.count = 3, .length = 30, .stride = 2, .affine = false, .drift = 0.2, .bias = true});
  const AbsorbedAttention start = truncated(fit);
  AbsorbedAttention attention = start;
  fit_queries(fit.sample, {}, attention);
  fit_keys(fit.sample, {}, attention);
  for (std::size_t h = 0; h < 4; ++h) {
    EXPECT_FALSE(start.query[h].col(10).isZero(0));
    EXPECT_TRUE(attention.query[h].col(10) == start.query[h].col(10));
    EXPECT_FALSE(attention.query[h].leftCols(10) == start.query[h].leftCols(10));
  }
  EXPECT_FALSE(start.key.col(10).isZero(0));
  EXPECT_TRUE(attention.key.col(10) == start.key.col(10));
  EXPECT_FALSE(attention.key.leftCols(10) == start.key.leftCols(10));
  // The output is not theirs to change.
  EXPECT_TRUE(attention.o == start.o);
  EXPECT_TRUE(attention.o_bias == start.o_bias);
  // With constants all of them do.
  const FitSample affine =
      fit_sample(22, {.count = 3, .length = 30, .stride = 2, .drift = 0.2, .bias = true});
  attention = start;
  fit_queries(affine.sample, {}, attention);
  fit_keys(affine.sample, {}, attention);
  EXPECT_FALSE(attention.query[0].col(10) == start.query[0].col(10));
  EXPECT_FALSE(attention.key.col(10) == start.key.col(10));
}

TEST(FitAttention, IsTheSameForAnyThreadCount) {
  for (const Index count : {3, 11}) {
    const auto fitted = [&](int threads, VectorD& spread) {
      const ThreadCount scope(threads);
      const FitSample fit =
          fit_sample(23, {.count = count, .length = 40, .stride = 3, .drift = 0.2, .bias = true});
      AbsorbedAttention attention = truncated(fit);
      fit_attention(fit.sample, {}, attention);
      spread = fit.sample.value_spread;
      return attention;
    };
    VectorD one;
    VectorD two;
    EXPECT_TRUE(same(fitted(1, one), fitted(2, two)));
    EXPECT_TRUE(one == two);
  }
}

// Nearly the same maps, and as near to the source.
TEST(FitAttention, ProductsInBfloat16) {
  if (!has_bf16_products()) {
    GTEST_SKIP() << "this processor has no bfloat16 products";
  }
  FitSample fit = fit_sample(29, {.count = 6, .length = 60, .stride = 2, .drift = 0.1, .bias = true});
  const AbsorbedAttention start = truncated(fit);
  AbsorbedAttention plain = start;
  fit_attention(fit.sample, {}, plain);
  fit.sample.compute = DType::bf16;
  AbsorbedAttention rounded = start;
  fit_attention(fit.sample, {}, rounded);
  EXPECT_FALSE(same(rounded, plain));
  EXPECT_LE(relative_error(rounded.key, plain.key), 1e-2);
  for (std::size_t h = 0; h < plain.query.size(); ++h) {
    EXPECT_LE(relative_error(rounded.query[h], plain.query[h]), 2e-2);
  }
  const auto error = [&](const AbsorbedAttention& attention) {
    return output_error(fit, attention, sequences_of(fit.sample), false);
  };
  EXPECT_LT(error(rounded), 0.9 * error(start));
  EXPECT_NEAR(error(rounded) / error(plain), 1, 0.02);
}

TEST(FitAttention, AlternatesAsTold) {
  const FitSample fit = fit_sample(24, {.count = 3, .length = 40, .stride = 2, .drift = 0.2});
  const AbsorbedAttention start = truncated(fit);
  const auto fitted = [&](const FitOptions& options) {
    AbsorbedAttention out = start;
    const ScoreError error = fit_attention(fit.sample, options, out);
    if (options.queries && options.rounds > 0) {
      EXPECT_NEAR(error.before / score_error(fit, start), 1, 1e-4);
      EXPECT_LT(error.after, error.before);
    } else {
      EXPECT_EQ(error.before, 0);
      EXPECT_EQ(error.after, 0);
    }
    return out;
  };
  EXPECT_TRUE(same(fitted({.rounds = 0}), start));
  EXPECT_TRUE(same(fitted({.queries = false, .keys = false}), start));

  // The last round is the queries' alone.
  AbsorbedAttention expected = start;
  fit_queries(fit.sample, {}, expected);
  EXPECT_FALSE(same(expected, start));
  EXPECT_TRUE(same(fitted({.rounds = 1}), expected));

  // Queries that the keys are about to leave behind take one step only, and the keys see them with the ranks
  // that there is room for.
  expected = start;
  fit_queries(fit.sample, {.steps = 1}, expected);
  limit_content_rank(expected, fit.sample.input_moment);
  for (const MatrixD& query : expected.query) {
    const VectorD sizes = symmetric_eigenpairs(query.bottomRows(5) * query.bottomRows(5).transpose()).values;
    EXPECT_LE(sizes(4), 1e-12 * sizes(0));
  }
  fit_keys(fit.sample, {}, expected);
  fit_queries(fit.sample, {}, expected);
  EXPECT_TRUE(same(fitted({.rounds = 2}), expected));

  const AbsorbedAttention no_queries = fitted({.queries = false});
  EXPECT_TRUE(no_queries.query == start.query);
  EXPECT_FALSE(no_queries.key == start.key);
  const AbsorbedAttention no_keys = fitted({.keys = false});
  EXPECT_TRUE(no_keys.key == start.key);
  EXPECT_FALSE(no_keys.query == start.query);
}

// On the tokens that it is given the layer comes nearer, in what it adds to the stream, too.
TEST(FitAttention, BringsTheOutputNearer) {
  for (const bool bias : {false, true}) {
    const FitSample fit = fit_sample(25, {.count = 6, .length = 60, .stride = 2, .drift = 0.1, .bias = bias});
    AbsorbedAttention attention = truncated(fit);
    const double before = output_error(fit, attention, sequences_of(fit.sample), false);
    fit_attention(fit.sample, {}, attention);
    const double fitted = output_error(fit, attention, sequences_of(fit.sample), false);
    EXPECT_LT(fitted, 0.9 * before);
  }
}

TEST(FitAttention, OfGroupsAndPartsIsBetterInItsOutput) {
  for (const PartedCase& test : parted_cases) {
    SCOPED_TRACE(name_of(test));
    const FitSample fit = fit_sample(34, {.count = 3, .length = 40, .stride = 2});
    const AbsorbedAttention start = parted(fit, test);
    AbsorbedAttention attention = start;
    const ScoreError error = fit_attention(fit.sample, {}, attention);
    EXPECT_NEAR(error.before / score_error(fit, start), 1, 1e-4);
    EXPECT_LT(error.after, error.before);
    // With the ranks that there is room for, too.
    limit_content_rank(attention, fit.sample.input_moment);
    EXPECT_LT(score_error(fit, attention), score_error(fit, start));
    EXPECT_LT(output_error(fit, attention, sequences_of(fit.sample), false),
              output_error(fit, start, sequences_of(fit.sample), false));
    for (const MatrixD& query : attention.query) {
      const Index rows = query.rows() - 4;
      if (rows > 4) {
        const VectorD sizes =
            symmetric_eigenpairs(query.bottomRows(rows) * query.bottomRows(rows).transpose()).values;
        EXPECT_LE(sizes(4), 1e-12 * sizes(0));
      }
    }
    // The same for any number of threads.
    const auto fitted = [&](int threads) {
      const ThreadCount scope(threads);
      AbsorbedAttention out = start;
      fit_attention(fit.sample, {}, out);
      return out;
    };
    EXPECT_TRUE(same(fitted(1), fitted(2)));
  }
}

}  // namespace
}  // namespace relatent
