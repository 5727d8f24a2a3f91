#include <gtest/gtest.h>

#include <limits>

#include "convert/latent/attention_fit.h"
#include "linalg/decompose.h"
#include "tests/support/fit_sample.h"

namespace relatent {
namespace {

using testing_support::add_norm_rows;
using testing_support::exact;
using testing_support::fit_sample;
using testing_support::fit_sample_options;
using testing_support::FitSample;
using testing_support::FitSampleOptions;
using testing_support::lossless;
using testing_support::name_of;
using testing_support::parted;
using testing_support::parted_cases;
using testing_support::parted_options;
using testing_support::PartedCase;
using testing_support::Random;
using testing_support::relative_error;
using testing_support::score_error;
using testing_support::score_errors;
using testing_support::score_variance;
using testing_support::sequences_of;
using testing_support::steepness;
using testing_support::truncated;

TEST(FitQueries, ErrorBeforeIsTheVarianceOfScoreErrors) {
  for (const FitSampleOptions& options : fit_sample_options) {
    SCOPED_TRACE(name_of(options));
    const FitSample fit = fit_sample(2, options);
    AbsorbedAttention attention = truncated(fit);
    const double expected = score_error(fit, attention);
    EXPECT_GT(expected, 1e-3);
    EXPECT_NEAR(fit_queries(fit.sample, {}, attention).before / expected, 1, 1e-4);
    // And with a norm on the latent.
    Random random(3);
    attention.norm = {random.matrix_d(2, 11), random.matrix_d(7, 1).cwiseAbs2()};
    const double normed = score_error(fit, attention);
    EXPECT_GT(std::abs(normed / score_error(fit, truncated(fit)) - 1), 0.01);
    EXPECT_NEAR(fit_queries(fit.sample, {}, attention).before / normed, 1, 1e-4);
  }
}

TEST(FitQueries, LosslessLayerStaysAsItIs) {
  for (const bool bias : {false, true}) {
    for (const Index stride : {1, 3}) {
      const FitSample fit = fit_sample(4, {.count = 3, .length = 30, .stride = stride, .bias = bias});
      const AbsorbedAttention before = lossless(fit);
      const double whole = score_variance(fit, before);
      AbsorbedAttention after = before;
      const ScoreError error = fit_queries(fit.sample, exact(5), after);
      EXPECT_LE(error.before, 1e-10 * whole);
      EXPECT_LE(error.after, error.before);
      EXPECT_LE(score_error(fit, after), 1e-10 * whole);
      // Two layers' scores compared with each other by way of their outputs.
      const MatrixD columns = fit.columns(1);
      EXPECT_LE(relative_error(testing_support::output_by_the_book(after, columns),
                               testing_support::output_by_the_book(before, columns)),
                1e-5);
    }
  }
}

TEST(FitQueries, BringPerturbedQueriesBack) {
  for (const FitSampleOptions& options : {FitSampleOptions{.count = 3, .length = 30},
                                          FitSampleOptions{.count = 6, .length = 40, .stride = 2}}) {
    SCOPED_TRACE(name_of(options));
    const FitSample fit = fit_sample(5, options);
    AbsorbedAttention attention = lossless(fit);
    const MatrixD key = attention.key;
    const MatrixD o = attention.o;
    Random random(6);
    for (MatrixD& query : attention.query) {
      query += 0.2 * random.matrix_d(query.rows(), query.cols());
    }
    const ScoreError error = fit_queries(fit.sample, exact(150), attention);
    EXPECT_GT(error.before, 0.1);
    EXPECT_LE(score_error(fit, attention), 1e-4 * error.before);
    EXPECT_NEAR(error.after, score_error(fit, attention), 1e-4 * error.before);
    EXPECT_TRUE(attention.key == key);
    EXPECT_TRUE(attention.o == o);
  }
}

TEST(FitQueries, NeverMakeScoresWorse) {
  for (const FitSampleOptions& options : fit_sample_options) {
    SCOPED_TRACE(name_of(options));
    const FitSample fit = fit_sample(7, options);
    for (const Index steps : {1, 2, 5}) {
      for (const double ridge : {1e-9, 1e-2, 0.3, 10.0}) {
        AbsorbedAttention attention = truncated(fit);
        const VectorD before = score_errors(fit, attention, sequences_of(fit.sample));
        FitOptions fit_options;
        fit_options.steps = steps;
        fit_options.query_ridge = ridge;
        const ScoreError error = fit_queries(fit.sample, fit_options, attention);
        const VectorD after = score_errors(fit, attention, sequences_of(fit.sample));
        EXPECT_TRUE((after.array() < before.array()).all()) << steps << " " << ridge;
        EXPECT_LT(error.after, error.before);
        // The ridge is part of the quadratic, so what is left of the scores themselves is no more than that.
        EXPECT_LE(after.mean(), error.after * 1.001) << steps << " " << ridge;
      }
    }
  }
}

TEST(FitQueries, MoreStepsAndLessRidgeFitBetter) {
  const FitSample fit = fit_sample(8, {.count = 4, .length = 30, .drift = 0.2});
  double before = INFINITY;
  for (const Index steps : {0, 1, 2, 4, 16}) {
    AbsorbedAttention attention = truncated(fit);
    fit_queries(fit.sample, exact(steps), attention);
    const double error = score_error(fit, attention);
    EXPECT_LT(error, before) << steps;
    before = error;
  }
  double change = INFINITY;
  before = 0;
  for (const double ridge : {1e-3, 1e-1, 1e1, 1e3}) {
    FitOptions options = exact(30);
    options.query_ridge = ridge;
    AbsorbedAttention attention = truncated(fit);
    fit_queries(fit.sample, options, attention);
    const double error = score_error(fit, attention);
    const double changed = (attention.query[2] - truncated(fit).query[2]).norm();
    EXPECT_GT(error, before) << ridge;
    EXPECT_LT(changed, change) << ridge;
    before = error;
    change = changed;
  }
  EXPECT_LT(change, 0.01 * truncated(fit).query[2].norm());
}

TEST(FitQueries, PredictionIsTheNextBefore) {
  for (const FitSampleOptions& options : fit_sample_options) {
    SCOPED_TRACE(name_of(options));
    const FitSample fit = fit_sample(9, options);
    for (const Index steps : {1, 3}) {
      AbsorbedAttention attention = truncated(fit);
      const ScoreError first = fit_queries(fit.sample, exact(steps), attention);
      const ScoreError second = fit_queries(fit.sample, exact(steps), attention);
      EXPECT_LE(first.after, first.before);
      EXPECT_LE(second.after, second.before);
      EXPECT_LT(second.before, 0.95 * first.before);
      EXPECT_NEAR(first.after / second.before, 1, 1e-3);
    }
  }
}

// At the end there is no direction left in which the error falls, whatever the way there was.
TEST(FitQueries, EndsWhereTheErrorIsStationary) {
  const FitSample fit = fit_sample(10, {.count = 4, .length = 30, .stride = 2, .drift = 0.2, .bias = true});
  const AbsorbedAttention start = truncated(fit);
  AbsorbedAttention end = start;
  fit_queries(fit.sample, exact(150), end);
  for (std::size_t h = 0; h < 4; ++h) {
    const auto steepness_at = [&](AbsorbedAttention attention) {
      return steepness([&] { return score_error(fit, attention); }, attention.query[h]);
    };
    EXPECT_LE(steepness_at(end), 1e-3 * steepness_at(start)) << h;
  }
}

// The same queries told of inputs of every head's own, which are those that all share in another order.
TEST(FitQueries, OfEveryHeadsOwnInputsAreTheSame) {
  const FitSample fit = fit_sample(12, {.count = 3, .length = 25, .stride = 3, .drift = 0.3, .bias = true});
  const AbsorbedAttention start = truncated(fit);
  const Index width = fit.sample.sampled_inputs.cols();
  // Column j of head h is column (j + h) of all; the constant stays the last.
  const auto order = [&](Index h) {
    MatrixD out = MatrixD::Zero(width, width);
    for (Index j = 0; j + 1 < width; ++j) {
      out((j + h) % (width - 1), j) = 1;
    }
    out(width - 1, width - 1) = 1;
    return out;
  };
  AttentionSample by_head = fit.sample;
  AbsorbedAttention turned = start;
  by_head.query_inputs.resize(fit.sample.sampled_inputs.rows(), 4 * width);
  by_head.query_moment.resize(0, 0);
  for (Index h = 0; h < 4; ++h) {
    const MatrixD turn = order(h);
    by_head.query_inputs.middleCols(h * width, width) = fit.sample.sampled_inputs * turn.cast<float>();
    by_head.head_moments.emplace_back(turn.transpose() * fit.sample.query_moment * turn);
    turned.query[static_cast<std::size_t>(h)] *= turn;
  }
  FitOptions options;
  options.steps = 3;
  AbsorbedAttention expected = start;
  const ScoreError error = fit_queries(fit.sample, options, expected);
  const ScoreError found = fit_queries(by_head, options, turned);
  EXPECT_NEAR(found.before / error.before, 1, 1e-4);
  EXPECT_NEAR(found.after / error.after, 1, 1e-3);
  for (Index h = 0; h < 4; ++h) {
    const auto at = static_cast<std::size_t>(h);
    EXPECT_LE(testing_support::relative_error(turned.query[at] * order(h).transpose(), expected.query[at]),
              1e-3);
  }
  // And so are the keys that are fitted to them.
  fit_keys(fit.sample, options, expected);
  fit_keys(by_head, options, turned);
  EXPECT_LE(testing_support::relative_error(turned.key, expected.key), 1e-3);
}

TEST(FitQueries, RefuseNaN) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const FitSample fit = fit_sample(26, {.count = 2, .length = 20});
  for (const int where : {0, 1, 2}) {
    AttentionSample broken = fit.sample;
    if (where == 0) {
      broken.source_query(7, 3) = nan;
    } else if (where == 1) {
      broken.source_key(7, 3) = nan;
    } else {
      broken.input_moment(2, 2) = nan;
      broken.query_moment(2, 2) = nan;
    }
    AbsorbedAttention attention = truncated(fit);
    EXPECT_THROW(fit_queries(broken, {}, attention), NumericalError) << where;
  }
}

TEST(FitQueries, OverPartsLowerTheMeanError) {
  for (const FitSampleOptions& options : parted_options) {
    for (const PartedCase& test : parted_cases) {
      for (const bool normed : {false, true}) {
        SCOPED_TRACE(name_of(options) + ", " + name_of(test) + (normed ? ", norm" : ""));
        const FitSample fit = fit_sample(30, options);
        AbsorbedAttention start = parted(fit, test);
        if (normed) {
          add_norm_rows(start);
        }
        AbsorbedAttention attention = start;
        const double before = score_error(fit, start);
        const ScoreError error = fit_queries(fit.sample, exact(3), attention);
        EXPECT_NEAR(error.before / before, 1, 1e-4);
        EXPECT_NEAR(error.after / score_error(fit, attention), 1, 1e-3);
        EXPECT_LT(error.after, 0.95 * before);
        EXPECT_TRUE(attention.key == start.key);
        // With a ridge every head's own error falls, and by no less than is said.
        attention = start;
        const ScoreError held = fit_queries(fit.sample, {}, attention);
        const VectorD after = score_errors(fit, attention, sequences_of(fit.sample));
        EXPECT_TRUE((after.array() < score_errors(fit, start, sequences_of(fit.sample)).array()).all());
        EXPECT_LE(after.mean(), held.after * 1.001);
      }
    }
  }
}

TEST(FitQueries, OverPartsEndWhereTheErrorIsStationary) {
  const FitSample fit = fit_sample(31, {.count = 4, .length = 30, .stride = 2, .drift = 0.2, .bias = true});
  for (const PartedCase& test :
       {PartedCase{{2, 1}, 4, 0}, PartedCase{{1, 2}, 7, 3}, PartedCase{{2, 2}, 6, 2}}) {
    SCOPED_TRACE(name_of(test));
    const AbsorbedAttention start = parted(fit, test);
    AbsorbedAttention end = start;
    fit_queries(fit.sample, exact(60), end);
    for (const std::size_t h : {0, 3}) {
      const auto steepness_at = [&](AbsorbedAttention attention) {
        return steepness([&] { return score_error(fit, attention); }, attention.query[h]);
      };
      EXPECT_LE(steepness_at(end), 1e-3 * steepness_at(start)) << h;
    }
  }
}

}  // namespace
}  // namespace relatent
