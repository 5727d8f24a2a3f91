#include "convert/latent/attention_fit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "convert/latent/partition.h"
#include "linalg/decompose.h"
#include "tests/support/absorbed.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::absorbed_layer;
using testing_support::GqaSample;
using testing_support::group_of;
using testing_support::key_of_part;
using testing_support::keys_by_the_book;
using testing_support::LayerSample;
using testing_support::query_by_the_book;
using testing_support::query_of_part;
using testing_support::Random;
using testing_support::random_gqa;
using testing_support::relative_error;
using testing_support::sample_inputs;
using testing_support::ThreadCount;

// Two groups of two heads; keys and values are 8 numbers each.
const GqaSample shape = {.hidden = 10, .heads = 4, .kv_heads = 2, .head_dim = 4};

struct SampleOptions {
  Index count = 1;
  Index length = 40;
  Index stride = 1;
  bool affine = true;
  double drift = 0;  // of the converted stream from the source's
  bool bias = false;
};

// A layer, sequences, and what a fit is told of them.
struct FitSample {
  LayerSample layer;  // x: the source's inputs of all sequences
  MatrixF values;     // of the source
  AttentionSample sample;

  MatrixD columns(Index sequence) const { return sample.inputs(sequence).cast<double>().transpose(); }
};

FitSample fit_sample(std::uint32_t seed, const SampleOptions& options) {
  Random random(seed);
  GqaSample gqa = shape;
  gqa.q_bias = gqa.kv_bias = gqa.o_bias = options.bias;
  FitSample out;
  const GqaAttention attention = random_gqa(random, gqa);
  const Index hidden = shape.hidden;
  const Index length = options.length;
  const MatrixF x = sample_inputs(random, options.count * length, hidden);
  const MatrixF drift = random.matrix(x.rows(), hidden, options.drift);
  out.layer = {attention, x, maps_of(attention), testing_support::sample_moments(random, x, shape.heads)};

  AttentionSample& sample = out.sample;
  sample.count = options.count;
  sample.length = length;
  sample.stride = options.stride;
  sample.head_dim = shape.head_dim;
  sample.group_size = 2;
  auto inputs = std::make_shared<MatrixF>(x.rows(), hidden + 1);
  *inputs << x + drift, VectorF::Constant(x.rows(), options.affine ? 1.0F : 0.0F);
  sample.inputs = [inputs, length](Index s) { return MatrixF(inputs->middleRows(s * length, length)); };

  const Index rows = sample.per_sequence();
  sample.sampled_inputs.resize(options.count * rows, hidden + 1);
  sample.source_query.resize(options.count * rows, 16);
  sample.source_key.resize(options.count * length, 8);
  sample.target.resize(options.count * rows, hidden);
  out.values.resize(options.count * length, 8);
  const RotaryTable table(attention.rotary, length);
  for (Index s = 0; s < options.count; ++s) {
    const MatrixF here = x.middleRows(s * length, length);
    const GqaProjections projections = project(attention, here, table);
    const MatrixF output = testing_support::output_of(attention, here);
    sample.source_key.middleRows(s * length, length) = projections.k;
    out.values.middleRows(s * length, length) = projections.v;
    for (Index i = 0; i < rows; ++i) {
      const Index at = sample.position(s, i);
      sample.sampled_inputs.row(s * rows + i) = inputs->row(s * length + at);
      sample.source_query.row(s * rows + i) = attention.scale * projections.q.row(at);
      // Off the source's stream there is that to make good, too.
      sample.target.row(s * rows + i) = output.row(at) - drift.row(s * length + at);
    }
  }
  const MatrixD sampled = sample.sampled_inputs.cast<double>();
  sample.input_moment = sampled.transpose() * sampled / static_cast<double>(sampled.rows());
  sample.query_inputs = sample.sampled_inputs;
  sample.query_moment = sample.input_moment;
  measure_value_spread(out.values, attention.o.weight, sample);
  return out;
}

// Every step-th sequence.
std::vector<Index> sequences_of(const AttentionSample& sample, Index step = 1) {
  std::vector<Index> out;
  for (Index s = 0; s < sample.count; s += step) {
    out.push_back(s);
  }
  return out;
}

// The source's scores of a sampled query with the keys that it sees.
VectorD source_scores(const AttentionSample& sample, Index sequence, Index head, Index i) {
  const Index d = sample.head_dim;
  const Index g = head / sample.group_size * d;
  const VectorD query = sample.source_query.row(sequence * sample.per_sequence() + i)
                            .segment(head * d, d)
                            .transpose()
                            .cast<double>();
  VectorD out(sample.position(sequence, i) + 1);
  for (Index n = 0; n < out.size(); ++n) {
    out(n) = query.dot(
        sample.source_key.row(sequence * sample.length + n).segment(g, d).transpose().cast<double>());
  }
  return out;
}

// The scores of one part of a head's group.
VectorD converted_scores(const AbsorbedAttention& a, const LatentGroup& group, const LatentPart& part,
                         const std::vector<VectorD>& keys, const VectorD& query, Index seen) {
  const VectorD asked = query_of_part(a, group, part, query);
  VectorD out(seen);
  for (Index n = 0; n < seen; ++n) {
    out(n) = asked.dot(key_of_part(a, group, part, keys[static_cast<std::size_t>(n)]));
  }
  return out;
}

double variance(const VectorD& weights, const VectorD& x) {
  const double mean = weights.dot(x);
  return weights.dot(VectorD(x.array() - mean).cwiseAbs2());
}

// J_h over those sequences, the mean over parts, [H].
VectorD score_errors(const FitSample& fit, const AbsorbedAttention& a, const std::vector<Index>& sequences) {
  const AttentionSample& sample = fit.sample;
  VectorD out = VectorD::Zero(a.heads());
  for (const Index s : sequences) {
    const MatrixD columns = fit.columns(s);
    const std::vector<VectorD> keys = keys_by_the_book(a, columns);
    for (Index h = 0; h < a.heads(); ++h) {
      const LatentGroup& group = group_of(a, h);
      for (Index i = 0; i < sample.per_sequence(); ++i) {
        const Index m = sample.position(s, i);
        const VectorD source = source_scores(sample, s, h, i);
        const VectorD weights = testing_support::softmax(source);
        const VectorD query = query_by_the_book(a, h, m, columns.col(m));
        for (const LatentPart& part : group.parts) {
          out(h) += variance(weights, source - converted_scores(a, group, part, keys, query, source.size())) /
                    static_cast<double>(group.parts.size());
        }
      }
    }
  }
  return out / static_cast<double>(static_cast<Index>(sequences.size()) * sample.per_sequence());
}

double score_error(const FitSample& fit, const AbsorbedAttention& a) {
  return score_errors(fit, a, sequences_of(fit.sample)).mean();
}

// What there is to say: the scores' own variance.
double score_variance(const FitSample& fit, AbsorbedAttention a) {
  for (MatrixD& query : a.query) {
    query.setZero();
  }
  return score_error(fit, a);
}

// E|target - output|² over those sequences, under the source's weights or the layer's own.
double output_error(const FitSample& fit, const AbsorbedAttention& a, const std::vector<Index>& sequences,
                    bool source_weights) {
  const AttentionSample& sample = fit.sample;
  double out = 0;
  for (const Index s : sequences) {
    const MatrixD columns = fit.columns(s);
    const std::vector<VectorD> keys = keys_by_the_book(a, columns);
    for (Index i = 0; i < sample.per_sequence(); ++i) {
      const Index m = sample.position(s, i);
      VectorD error = sample.target.row(s * sample.per_sequence() + i).transpose().cast<double>() - a.o_bias;
      for (Index h = 0; h < a.heads(); ++h) {
        const LatentGroup& group = group_of(a, h);
        const VectorD query = query_by_the_book(a, h, m, columns.col(m));
        VectorD latent = VectorD::Zero(group.rank);
        for (std::size_t b = 0; b < group.parts.size(); ++b) {
          const LatentPart& part = group.parts[b];
          const VectorD weights =
              testing_support::softmax(source_weights ? source_scores(sample, s, h, i)
                                                      : converted_scores(a, group, part, keys, query, m + 1));
          for (Index n = 0; n <= m; ++n) {
            const VectorD c =
                keys[static_cast<std::size_t>(n)].segment(a.rope_dim() + group.first, group.rank);
            latent.segment(part.first, part.rank) += weights(n) * c.segment(part.first, part.rank);
            if (b == 0) {
              latent.head(group.shared) += weights(n) * c.head(group.shared);
            }
          }
        }
        const Index w = a.v_dim();
        error -= a.o.middleCols(h * w, w) * (a.value_up[static_cast<std::size_t>(h)] * latent);
      }
      out += error.squaredNorm();
    }
  }
  return out / static_cast<double>(static_cast<Index>(sequences.size()) * sample.per_sequence());
}

// What fit_keys makes small. It looks at every second sequence.
double key_objective(const FitSample& fit, const AbsorbedAttention& a, double score_weight) {
  const std::vector<Index> sequences = sequences_of(fit.sample, 2);
  return score_weight * fit.sample.value_spread.dot(score_errors(fit, a, sequences)) +
         output_error(fit, a, sequences, true);
}

// No regularisation to speak of, and steps enough to solve the systems.
FitOptions exact(Index steps) {
  return {.steps = steps, .query_ridge = 1e-9, .key_ridge = 1e-9, .output_ridge = 1e-9, .score_weight = 0.3};
}

// Two of four rotary pairs and 5 of 16 latent coordinates.
AbsorbedAttention truncated(const FitSample& fit) {
  return absorbed_layer(fit.layer, 2, 5);
}

// Every rotary pair and values in full.
AbsorbedAttention lossless(const FitSample& fit) {
  return absorbed_layer(fit.layer, 4, 8);
}

const std::vector<SampleOptions> sample_options = {
    {},
    {.bias = true},
    {.drift = 0.3},
    {.count = 3, .length = 25, .stride = 3, .drift = 0.3, .bias = true},
    {.count = 5, .length = 20, .stride = 2, .affine = false, .drift = 0.1},
    // More sequences than are added up at once, and positions left over at the end.
    {.count = 9, .length = 11, .stride = 4, .drift = 0.1},
};

std::string name_of(const SampleOptions& options) {
  return std::to_string(options.count) + " x " + std::to_string(options.length) + " / " +
         std::to_string(options.stride) + (options.affine ? " affine" : "") +
         (options.bias ? " biases" : "") + " drift " + std::to_string(options.drift);
}

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
  for (const SampleOptions& options : sample_options) {
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

TEST(FitQueries, ErrorBeforeIsTheVarianceOfScoreErrors) {
  for (const SampleOptions& options : sample_options) {
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
  for (const SampleOptions& options :
       {SampleOptions{.count = 3, .length = 30}, SampleOptions{.count = 6, .length = 40, .stride = 2}}) {
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
  for (const SampleOptions& options : sample_options) {
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
  for (const SampleOptions& options : sample_options) {
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

// The slopes of a function of one matrix along ten directions, all told; exact for a quadratic.
template <typename Function>
double steepness(const Function& function, MatrixD& at) {
  Random random(100);
  const MatrixD here = at;
  double out = 0;
  for (Index i = 0; i < 10; ++i) {
    const MatrixD direction = random.matrix_d(here.rows(), here.cols());
    at = here + direction;
    const double above = function();
    at = here - direction;
    out += std::abs(above - function()) / 2;
  }
  at = here;
  return out;
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

TEST(FitKeys, LowerWhatTheyMinimise) {
  for (const SampleOptions& options : sample_options) {
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

bool same(const AbsorbedAttention& a, const AbsorbedAttention& b) {
  return a.key == b.key && a.query == b.query && a.value_up == b.value_up && a.o == b.o &&
         a.o_bias == b.o_bias;
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

TEST(KeepWeights, ChangesNothingButTime) {
  const SampleOptions options{.count = 5, .length = 70, .stride = 2, .drift = 0.2};
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

struct PartedCase {
  Partition partition;
  Index rank;  // of the first group; each later one has one more
  Index key_rank;
};

const std::vector<PartedCase> parted_cases = {{{2, 1}, 4, 0}, {{4, 1}, 3, 0},  {{1, 2}, 7, 3},
                                              {{1, 2}, 6, 0}, {{1, 4}, 11, 3}, {{2, 2}, 6, 2}};

std::string name_of(const PartedCase& test) {
  return std::to_string(test.partition.groups) + " groups of " + std::to_string(test.partition.parts) + ", " +
         std::to_string(test.key_rank) + " shared";
}

// Two of four rotary pairs; parts may ask for what is their own, as a fit lets them.
AbsorbedAttention parted(const FitSample& fit, const PartedCase& test) {
  const RotaryKey key = testing_support::concentrated_key(fit.layer, 2);
  std::vector<JointLatent> latents;
  for (Index g = 0; g < test.partition.groups; ++g) {
    JointLatentOptions options{.rank = test.rank + g};
    options.key_rank = test.partition.parts > 1 ? test.key_rank : -1;
    options.first_head = test.partition.first_head(g, 4);
    options.head_count = test.partition.first_head(g + 1, 4) - options.first_head;
    latents.push_back(joint_latent(fit.layer.maps, fit.layer.moments, key, options));
  }
  AbsorbedAttention out = absorb(fit.layer.maps, key, latents, test.partition.parts);
  Random random(101);
  for (MatrixD& query : out.query) {
    query += 0.05 * random.matrix_d(query.rows(), query.cols());
  }
  return out;
}

const std::vector<SampleOptions> parted_options = {
    {.drift = 0.3}, {.count = 3, .length = 25, .stride = 3, .drift = 0.3, .bias = true}};

// The same with a norm that every device holds.
void add_norm_rows(AbsorbedAttention& a) {
  Random random(102);
  a.norm_rows = random.matrix(6, shape.hidden, 0.4);
  a.norm_eps = 0.1F;
}

TEST(FitQueries, OverPartsLowerTheMeanError) {
  for (const SampleOptions& options : parted_options) {
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

TEST(FitKeys, OfGroupsAndPartsLowerWhatTheyMinimise) {
  for (const SampleOptions& options : parted_options) {
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
