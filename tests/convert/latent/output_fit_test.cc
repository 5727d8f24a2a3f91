#include <gtest/gtest.h>

#include "convert/compute/backend.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/conjugate_gradients.h"
#include "tests/support/fit_sample.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::fit_sample;
using testing_support::fit_sample_options;
using testing_support::FitSample;
using testing_support::FitSampleOptions;
using testing_support::lossless;
using testing_support::name_of;
using testing_support::output_error;
using testing_support::parted;
using testing_support::parted_cases;
using testing_support::PartedCase;
using testing_support::Random;
using testing_support::same;
using testing_support::sequences_of;
using testing_support::ThreadCount;
using testing_support::truncated;

constexpr double kNoRidge = 1e-12;

std::unique_ptr<OutputProblem> problem_of(const FitSample& fit, const AbsorbedAttention& attention) {
  return backend().output_problem(fit.sample, attention, kNoRidge, kNoRidge);
}

double own_error(const FitSample& fit, const AbsorbedAttention& attention) {
  return output_error(fit, attention, sequences_of(fit.sample), false);
}

Systems random_direction(Random& random, const AbsorbedAttention& attention) {
  Systems out;
  for (const MatrixD& query : attention.query) {
    out.push_back(random.matrix_d(query.rows(), query.cols()));
  }
  out.push_back(random.matrix_d(attention.key.rows(), attention.key.cols()));
  return out;
}

AbsorbedAttention moved(AbsorbedAttention attention, const Systems& way, double part) {
  for (std::size_t h = 0; h < attention.query.size(); ++h) {
    attention.query[h] += part * way[h];
  }
  attention.key += part * way.back();
  return attention;
}

double inner(const Systems& a, const Systems& b) {
  double out = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    out += a[i].cwiseProduct(b[i]).sum();
  }
  return out;
}

// The residual is half of the error's slope downwards, along any direction.
void expect_slope(const FitSample& fit, const AbsorbedAttention& attention) {
  const Systems residual = problem_of(fit, attention)->start({}).residual;
  Random random(3);
  for (int i = 0; i < 4; ++i) {
    const Systems way = random_direction(random, attention);
    constexpr double step = 1e-3;
    const double slope = (problem_of(fit, moved(attention, way, step))->error() -
                          problem_of(fit, moved(attention, way, -step))->error()) /
                         (2 * step);
    const double scale = std::sqrt(inner(residual, residual) * inner(way, way));
    EXPECT_NEAR(-2 * inner(residual, way), slope, 5e-3 * scale);
  }
}

// Where the error is small against what a step changes, the linearised problem says what that step does.
void expect_curvature(const FitSample& fit, const AbsorbedAttention& attention) {
  const auto problem = problem_of(fit, attention);
  const FitProblem::Start start = problem->start({});
  Random random(4);
  const Systems way = random_direction(random, attention);
  constexpr double step = 3e-3;
  const double foretold = step * step * inner(way, problem->apply(way));
  const double reached = problem_of(fit, moved(attention, way, step))->error() - start.error.front() +
                         2 * step * inner(start.residual, way);
  EXPECT_NEAR(reached / foretold, 1, 0.1);
}

TEST(OutputProblem, SaysTheErrorUnderItsOwnWeights) {
  for (const FitSampleOptions& options : fit_sample_options) {
    SCOPED_TRACE(name_of(options));
    const FitSample fit = fit_sample(40, options);
    const AbsorbedAttention attention = truncated(fit);
    EXPECT_NEAR(problem_of(fit, attention)->error() / own_error(fit, attention), 1, 1e-4);
    EXPECT_NEAR(problem_of(fit, attention)->start({}).error.front() / own_error(fit, attention), 1, 1e-4);
  }
  for (const PartedCase& test : parted_cases) {
    SCOPED_TRACE(name_of(test));
    const FitSample fit = fit_sample(41, {.count = 3, .length = 20, .stride = 2, .drift = 0.1});
    const AbsorbedAttention attention = parted(fit, test);
    EXPECT_NEAR(problem_of(fit, attention)->error() / own_error(fit, attention), 1, 1e-4);
  }
}

TEST(OutputProblem, ItsResidualIsTheSlope) {
  for (const FitSampleOptions& options : fit_sample_options) {
    SCOPED_TRACE(name_of(options));
    const FitSample fit = fit_sample(42, options);
    expect_slope(fit, truncated(fit));
  }
  for (const PartedCase& test : parted_cases) {
    SCOPED_TRACE(name_of(test));
    const FitSample fit = fit_sample(43, {.count = 3, .length = 20, .stride = 2});
    expect_slope(fit, parted(fit, test));
  }
  FitSample capped = fit_sample(44, {.count = 3, .length = 20});
  capped.sample.softcap = 1.5F;
  expect_slope(capped, truncated(capped));
}

TEST(OutputProblem, ItsCurvatureIsThatOfTheOutput) {
  const FitSample fit = fit_sample(45, {.count = 3, .length = 30, .bias = true});
  expect_curvature(fit, lossless(fit));
  // With a cap on scores and with several parts, changes and gradients are each other's transposes.
  const auto expect_symmetric = [](const FitSample& sampled, const AbsorbedAttention& attention) {
    const auto problem = problem_of(sampled, attention);
    problem->start({});
    Random random(5);
    const Systems one = random_direction(random, attention);
    const Systems two = random_direction(random, attention);
    EXPECT_GT(inner(one, problem->apply(one)), 0);
    EXPECT_NEAR(inner(one, problem->apply(two)) / inner(two, problem->apply(one)), 1, 1e-3);
  };
  FitSample capped = fit_sample(46, {.count = 3, .length = 30});
  capped.sample.softcap = 1.5F;
  expect_symmetric(capped, lossless(capped));
  for (const PartedCase& test : parted_cases) {
    SCOPED_TRACE(name_of(test));
    expect_symmetric(fit, parted(fit, test));
  }
}

TEST(FitOutput, BringsTheOutputNearer) {
  for (const bool affine : {true, false}) {
    const FitSample fit = fit_sample(47, {.count = 6, .length = 40, .stride = 2, .affine = affine});
    AbsorbedAttention attention = truncated(fit);
    fit_attention(fit.sample, {}, attention);
    limit_content_rank(attention, fit.sample.input_moment, asked_moments(fit.sample));
    const double least = least_output_error(fit.sample, {}, affine, attention);
    const double fitted = own_error(fit, attention);
    double last = fitted;
    for (const Index rounds : {1, 2, 4}) {
      AbsorbedAttention moved = attention;
      const OutputError error = fit_output(fit.sample, {.output_rounds = rounds}, affine, moved);
      EXPECT_LT(error.before, fitted);
      EXPECT_NEAR(least / error.before, 1, 1e-3);
      EXPECT_NEAR(error.after / own_error(fit, moved), 1, 1e-4);
      EXPECT_LT(error.after, rounds == 1 ? 0.95 * error.before : last);
      EXPECT_TRUE(moved.value_up == attention.value_up);
      last = error.after;
    }
  }
}

TEST(FitOutput, DoesAsItIsTold) {
  const FitSample fit = fit_sample(48, {.count = 3, .length = 30, .drift = 0.1});
  const AbsorbedAttention start = truncated(fit);
  AbsorbedAttention attention = start;
  const OutputError nothing = fit_output(fit.sample, {}, true, attention);
  EXPECT_EQ(nothing.before, 0);
  EXPECT_TRUE(same(attention, start));
  fit_output(fit.sample, {.refit = false, .output_rounds = 1}, true, attention);
  EXPECT_TRUE(attention.o == start.o);
  EXPECT_TRUE(attention.o_bias == start.o_bias);
  EXPECT_FALSE(attention.key == start.key);
  EXPECT_FALSE(attention.query[3] == start.query[3]);
  // What is exact stays.
  AbsorbedAttention exact = lossless(fit_sample(49, {.count = 3, .length = 30}));
  const FitSample same_layer = fit_sample(49, {.count = 3, .length = 30});
  const double before = own_error(same_layer, exact);
  fit_output(same_layer.sample, {.refit = false, .output_rounds = 2}, true, exact);
  EXPECT_LE(own_error(same_layer, exact), before + 1e-9);
}

TEST(FitOutput, OfGroupsAndPartsForAnyThreadCount) {
  for (const PartedCase& test : parted_cases) {
    SCOPED_TRACE(name_of(test));
    const FitSample fit = fit_sample(50, {.count = 3, .length = 30, .stride = 2});
    const auto fitted = [&](int threads, OutputError& error) {
      const ThreadCount scope(threads);
      AbsorbedAttention out = parted(fit, test);
      error = fit_output(fit.sample, {.output_rounds = 2}, true, out);
      return out;
    };
    OutputError error;
    const AbsorbedAttention one = fitted(1, error);
    EXPECT_LT(error.after, error.before);
    EXPECT_TRUE(same(one, fitted(2, error)));
  }
}

}  // namespace
}  // namespace relatent
