#include <gtest/gtest.h>

#include "convert/latent/attention_fit.h"
#include "tests/support/fit_sample.h"

namespace relatent {
namespace {

using testing_support::add_norm_rows;
using testing_support::exact;
using testing_support::fit_sample;
using testing_support::fit_sample_options;
using testing_support::FitSample;
using testing_support::FitSampleOptions;
using testing_support::key_objective;
using testing_support::lossless;
using testing_support::name_of;
using testing_support::output_error;
using testing_support::parted;
using testing_support::parted_cases;
using testing_support::parted_options;
using testing_support::PartedCase;
using testing_support::Random;
using testing_support::score_errors;
using testing_support::steepness;
using testing_support::truncated;

TEST(FitKeys, LowerWhatTheyMinimise) {
  for (const FitSampleOptions& options : fit_sample_options) {
    SCOPED_TRACE(name_of(options));
    const FitSample fit = fit_sample(12, options);
    for (const double score_weight : {0.0, 0.3, 10.0}) {
      double before = key_objective(fit, truncated(fit), score_weight);
      for (const Index steps : {1, 2, 8}) {
        AbsorbedAttention attention = truncated(fit);
        FitOptions fit_options = exact(steps);
        fit_options.score_weight = score_weight;
        fit_keys(fit.sample, fit_options, attention);
        const double after = key_objective(fit, attention, score_weight);
        EXPECT_LT(after, before) << score_weight << " " << steps;
        before = after;
        EXPECT_TRUE(attention.query[1] == truncated(fit).query[1]);
        EXPECT_TRUE(attention.value_up[1] == truncated(fit).value_up[1]);
        EXPECT_TRUE(attention.o == truncated(fit).o);
      }
      FitOptions fit_options;
      fit_options.score_weight = score_weight;
      AbsorbedAttention attention = truncated(fit);
      fit_keys(fit.sample, fit_options, attention);
      EXPECT_LT(key_objective(fit, attention, score_weight),
                key_objective(fit, truncated(fit), score_weight));
    }
  }
}

TEST(FitKeys, EndWhereTheSumIsStationary) {
  const FitSample fit = fit_sample(13, {.count = 3, .length = 30, .drift = 0.2, .bias = true});
  const AbsorbedAttention start = truncated(fit);
  AbsorbedAttention end = start;
  fit_keys(fit.sample, exact(150), end);
  const auto steepness_at = [&](AbsorbedAttention attention) {
    return steepness([&] { return key_objective(fit, attention, 0.3); }, attention.key);
  };
  EXPECT_LE(steepness_at(end), 1e-3 * steepness_at(start));
}

TEST(FitKeys, BringAPerturbedKeyBack) {
  const FitSample fit = fit_sample(15, {.count = 3, .length = 40, .bias = true});
  AbsorbedAttention attention = lossless(fit);
  const double exactly = key_objective(fit, attention, 0.3);
  Random random(16);
  attention.key += 0.2 * random.matrix_d(16, 11);
  const double perturbed = key_objective(fit, attention, 0.3);
  fit_keys(fit.sample, exact(150), attention);
  EXPECT_LE(exactly, 1e-10 * perturbed);
  EXPECT_LE(key_objective(fit, attention, 0.3), 1e-4 * perturbed);
}

TEST(FitKeys, ARidgeHoldsThemBack) {
  const FitSample fit = fit_sample(28, {.count = 3, .length = 30, .drift = 0.2});
  double change = INFINITY;
  double before = 0;
  for (const double ridge : {1e-3, 1e-1, 1e1, 1e3}) {
    FitOptions options = exact(30);
    options.key_ridge = ridge;
    AbsorbedAttention attention = truncated(fit);
    fit_keys(fit.sample, options, attention);
    const double objective = key_objective(fit, attention, 0.3);
    const double changed = (attention.key - truncated(fit).key).norm();
    EXPECT_GT(objective, before) << ridge;
    EXPECT_LT(changed, change) << ridge;
    before = objective;
    change = changed;
  }
  EXPECT_LT(change, 0.01 * truncated(fit).key.norm());
}

// The more scores weigh, the better they get, and the worse the output.
TEST(FitKeys, ScoreWeightTradesOutputForScores) {
  const FitSample fit = fit_sample(17, {.count = 1, .length = 60});
  double scores_before = INFINITY;
  double output_before = 0;
  for (const double score_weight : {0.01, 1.0, 100.0}) {
    FitOptions options = exact(60);
    options.score_weight = score_weight;
    AbsorbedAttention attention = truncated(fit);
    fit_keys(fit.sample, options, attention);
    const double scores = fit.sample.value_spread.dot(score_errors(fit, attention, {0}));
    const double output = output_error(fit, attention, {0}, true);
    EXPECT_LT(scores, scores_before) << score_weight;
    EXPECT_GT(output, output_before) << score_weight;
    scores_before = scores;
    output_before = output;
  }
}

TEST(FitKeys, OfGroupsAndPartsLowerWhatTheyMinimise) {
  for (const FitSampleOptions& options : parted_options) {
    for (const PartedCase& test : parted_cases) {
      for (const bool normed : {false, true}) {
        SCOPED_TRACE(name_of(options) + ", " + name_of(test) + (normed ? ", norm" : ""));
        const FitSample fit = fit_sample(32, options);
        AbsorbedAttention start = parted(fit, test);
        if (normed) {
          add_norm_rows(start);
        }
        for (const double score_weight : {0.0, 0.3, 10.0}) {
          double before = key_objective(fit, start, score_weight);
          for (const Index steps : {1, 3}) {
            AbsorbedAttention attention = start;
            FitOptions fit_options = exact(steps);
            fit_options.score_weight = score_weight;
            fit_keys(fit.sample, fit_options, attention);
            const double after = key_objective(fit, attention, score_weight);
            EXPECT_LT(after, before) << score_weight << " " << steps;
            before = after;
            EXPECT_TRUE(attention.query == start.query);
            EXPECT_TRUE(attention.value_up == start.value_up);
          }
        }
      }
    }
  }
}

TEST(FitKeys, OfGroupsAndPartsEndWhereTheSumIsStationary) {
  const FitSample fit = fit_sample(33, {.count = 3, .length = 30, .drift = 0.2, .bias = true});
  for (const PartedCase& test :
       {PartedCase{{2, 1}, 4, 0}, PartedCase{{1, 2}, 7, 3}, PartedCase{{2, 2}, 6, 2}}) {
    for (const bool normed : {false, true}) {
      SCOPED_TRACE(name_of(test) + (normed ? ", norm" : ""));
      AbsorbedAttention start = parted(fit, test);
      if (normed) {
        add_norm_rows(start);
      }
      AbsorbedAttention end = start;
      fit_keys(fit.sample, exact(60), end);
      const auto steepness_at = [&](AbsorbedAttention attention) {
        return steepness([&] { return key_objective(fit, attention, 0.3); }, attention.key);
      };
      EXPECT_LE(steepness_at(end), 1e-3 * steepness_at(start));
    }
  }
}

}  // namespace
}  // namespace relatent
