#include "convert/latent/from_mla.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/products.h"
#include "linalg/decompose.h"
#include "tests/support/absorbed.h"
#include "tests/support/latents.h"

namespace relatent {
namespace {

using testing_support::kFloatNoise;
using testing_support::latent_by_the_book;
using testing_support::output_by_the_book;
using testing_support::output_of;
using testing_support::position_of;
using testing_support::Random;
using testing_support::random_latent;
using testing_support::relative_error;
using testing_support::sample_inputs;
using testing_support::with_ones;

MatrixD moment_of(const MatrixF& rows) {
  const MatrixD columns = with_ones(rows);
  return columns * columns.transpose() / static_cast<double>(rows.rows());
}

// An MLA layer with a latent of 8, its inputs and their moments.
struct MlaSample {
  LatentAttention layer;
  MatrixF x;
  MatrixD moment;
  MatrixD query_moment;
};

constexpr Index hidden = 24;

MlaSample mla_sample(std::uint32_t seed, bool norm, bool low_rank_query, Index nope_dim = 5,
                     Index input_rank = hidden) {
  Random random(seed);
  MlaSample out;
  out.layer = random_latent(random,
                            {.name = "",
                             .form = "mla",
                             .branches = 1,
                             .rank = 8,
                             .nope_dim = nope_dim,
                             // A normalised latent has no bias.
                             .bias = !norm && input_rank == hidden,
                             .norm = norm ? LatentNorm::branch : LatentNorm::none,
                             .q_rank = low_rank_query ? std::optional<Index>(9) : std::nullopt},
                            hidden);
  out.x = sample_inputs(random, 50, input_rank);
  if (input_rank < hidden) {
    out.x = (out.x * random.matrix(input_rank, hidden, 0.5)).eval();
  }
  out.moment = moment_of(out.x);
  out.query_moment = moment_of(query_features(out.layer, out.x));
  return out;
}

LatentAttention written(const MlaSample& sample, const AbsorbedAttention& absorbed) {
  LatentAttention out = to_latent_attention(absorbed, sample.moment, sample.query_moment);
  out.q_down = sample.layer.q_down;
  out.q_norm = sample.layer.q_norm;
  return out;
}

// How far the converted layer is from the source.
double lost(const MlaSample& sample, const FromMlaOptions& options) {
  const AbsorbedAttention absorbed = from_mla(sample.layer, sample.moment, sample.query_moment, {}, options);
  return relative_error(output_of(written(sample, absorbed), sample.x),
                        output_by_the_book(sample.layer, sample.x));
}

std::string name_of(const FromMlaOptions& options) {
  return std::to_string(options.partition.groups) + " groups of " + std::to_string(options.partition.parts) +
         ", rank " + std::to_string(options.rank) + ", " + std::to_string(options.key_rank) + " shared";
}

TEST(FromMla, AtFullRankReturnsTheSource) {
  for (const bool norm : {false, true}) {
    for (const bool low_rank_query : {false, true}) {
      const MlaSample sample = mla_sample(1, norm, low_rank_query);
      for (const FromMlaOptions& options :
           {FromMlaOptions{.partition = {1, 1}, .rank = 8}, FromMlaOptions{.partition = {2, 1}, .rank = 8},
            FromMlaOptions{.partition = {4, 1}, .rank = 8}, FromMlaOptions{.partition = {1, 1}, .rank = 11},
            // Keys and values alike are in what is shared.
            FromMlaOptions{.partition = {1, 2}, .rank = 16, .key_rank = 8},
            FromMlaOptions{.partition = {1, 4}, .rank = 12, .key_rank = 8},
            FromMlaOptions{.partition = {2, 2}, .rank = 10, .key_rank = 8},
            // More of everything than there is.
            FromMlaOptions{.partition = {1, 2}, .rank = 22, .key_rank = 10}}) {
        SCOPED_TRACE(name_of(options) + (norm ? ", norm" : "") + (low_rank_query ? ", low-rank query" : ""));
        EXPECT_LE(lost(sample, options), kFloatNoise);
      }
    }
  }
}

TEST(FromMla, IsTheAbsorbedLayer) {
  // A query of x̃ itself: what the book of absorbed layers reads.
  for (const bool norm : {false, true}) {
    const MlaSample sample = mla_sample(2, norm, false);
    for (const FromMlaOptions& options :
         {FromMlaOptions{.partition = {1, 1}, .rank = 5}, FromMlaOptions{.partition = {4, 1}, .rank = 3},
          FromMlaOptions{.partition = {1, 2}, .rank = 7, .key_rank = 3},
          FromMlaOptions{.partition = {1, 4}, .rank = 9, .key_rank = 4},
          FromMlaOptions{.partition = {2, 2}, .rank = 6, .key_rank = 2}}) {
      SCOPED_TRACE(name_of(options));
      const AbsorbedAttention absorbed =
          from_mla(sample.layer, sample.moment, sample.query_moment, {}, options);
      EXPECT_EQ(absorbed.rank(), options.partition.groups * options.rank);
      ASSERT_EQ(static_cast<Index>(absorbed.groups.size()), options.partition.groups);
      Index coordinates = 0;
      for (std::size_t g = 0; g < absorbed.groups.size(); ++g) {
        const LatentGroup& group = absorbed.groups[g];
        EXPECT_EQ(group.first_head, options.partition.first_head(static_cast<Index>(g), 6));
        EXPECT_EQ(group.shared, options.key_rank);
        ASSERT_EQ(static_cast<Index>(group.parts.size()), options.partition.parts);
        Index own = 0;
        for (const LatentPart& part : group.parts) {
          own += part.rank;
        }
        EXPECT_EQ(group.shared + own, options.rank);
        coordinates += group.rank;
      }
      EXPECT_EQ(coordinates, absorbed.rank());
      const LatentAttention layer = written(sample, absorbed);
      EXPECT_EQ(layer.norm_rows.rows(), norm ? 8 : 0);
      EXPECT_EQ(layer.norm_eps, norm ? 1e-6F : 0);
      EXPECT_TRUE(layer.rotary_key.weight == sample.layer.rotary_key.weight);
      EXPECT_EQ(layer.scale, sample.layer.scale);
      EXPECT_LE(relative_error(output_of(layer, sample.x), output_by_the_book(absorbed, with_ones(sample.x))),
                kFloatNoise);
      EXPECT_LE(relative_error(output_of(layer, sample.x), output_by_the_book(layer, sample.x)), kFloatNoise);
    }
  }
}

// Latents of a few dimensions need no more coordinates.
TEST(FromMla, NeedsNoMoreCoordinatesThanTheLatentHas) {
  for (const bool norm : {false, true}) {
    const MlaSample sample = mla_sample(3, norm, true, 5, 3);
    for (const Partition& partition : {Partition{1, 1}, Partition{2, 1}}) {
      EXPECT_LE(lost(sample, {.partition = partition, .rank = 3}), kFloatNoise);
      EXPECT_GT(lost(sample, {.partition = partition, .rank = 2}), 0.01);
    }
    for (const Partition& partition : {Partition{1, 2}, Partition{2, 2}}) {
      EXPECT_LE(lost(sample, {.partition = partition, .rank = 5, .key_rank = 3}), kFloatNoise);
      EXPECT_GT(lost(sample, {.partition = partition, .rank = 5, .key_rank = 2}), 0.01);
    }
  }
}

TEST(FromMla, LosesLessWithMoreCoordinates) {
  const MlaSample sample = mla_sample(4, true, true);
  for (const Partition& partition : {Partition{1, 1}, Partition{2, 1}}) {
    double before = 1;
    for (const Index rank : {2, 4, 6, 8}) {
      const double error = lost(sample, {.partition = partition, .rank = rank});
      EXPECT_LT(error, before) << rank;
      before = error;
    }
  }
  double before = 1;
  for (const Index key_rank : {1, 3, 5, 7, 8}) {
    const double error = lost(sample, {.partition = {1, 2}, .rank = 10, .key_rank = key_rank});
    EXPECT_LT(error, before) << key_rank;
    before = error;
  }
}

// ĉ of every input, one to a column.
MatrixD latents_by_the_book(const MlaSample& sample) {
  MatrixD out(8, sample.x.rows());
  for (Index n = 0; n < out.cols(); ++n) {
    out.col(n) = latent_by_the_book(sample.layer, sample.layer.branches[0], position_of(sample.x, n));
  }
  return out;
}

// Errors of the heads first ... first + count - 1 over every query and every key, against what there is; and
// the loss that no latent of some rank undercuts.
struct Losses {
  double key = 0;
  double value = 0;
};

Losses losses_of(const MlaSample& sample, const AbsorbedAttention& a, const LatentGroup& group) {
  const LatentAttention& source = sample.layer;
  const Index n = source.nope_dim;
  const Index p = source.rope_dim;
  const Index w = source.v_dim;
  const MatrixD latents = latents_by_the_book(sample);
  const MatrixF features = query_features(source, sample.x);
  const MatrixD asked = product(source.q, features).cast<double>();
  const MatrixD inputs = with_ones(features);
  const MatrixD kept = a.latent_of(group) * with_ones(sample.x);
  Losses all;
  Losses missing;
  for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
    const MatrixD up = source.branches[0].up.middleRows(h * (n + w), n + w).cast<double>();
    const MatrixD scores =
        static_cast<double>(source.scale) * asked.middleCols(h * (n + p), n) * up.topRows(n) * latents;
    const MatrixD& query = a.query[static_cast<std::size_t>(h)];
    const MatrixD found = (query.bottomRows(query.rows() - p) * inputs).transpose() * kept;
    all.key += scores.squaredNorm();
    missing.key += (scores - found).squaredNorm();
    const MatrixD o = source.o.weight.middleCols(h * w, w).cast<double>();
    const MatrixD values = o * up.bottomRows(w) * latents;
    all.value += values.squaredNorm();
    missing.value += (values - o * a.value_up[static_cast<std::size_t>(h)] * kept).squaredNorm();
  }
  return {missing.key / all.key, missing.value / all.value};
}

// How the heads of a group see latents as keys and as values, and the latents' covariance.
struct Metrics {
  MatrixD keys;
  MatrixD values;
  MatrixD covariance;
};

Metrics metrics_of(const MlaSample& sample, const LatentGroup& group, const HeadEffects& effects) {
  const LatentAttention& source = sample.layer;
  const Index n = source.nope_dim;
  const Index p = source.rope_dim;
  const Index w = source.v_dim;
  const MatrixD latents = latents_by_the_book(sample);
  const MatrixD asked = product(source.q, query_features(source, sample.x)).cast<double>();
  Metrics out{MatrixD::Zero(8, 8), MatrixD::Zero(8, 8),
              latents * latents.transpose() / static_cast<double>(latents.cols())};
  for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
    const MatrixD up = source.branches[0].up.middleRows(h * (n + w), n + w).cast<double>();
    const MatrixD wanted =
        static_cast<double>(source.scale) * asked.middleCols(h * (n + p), n) * up.topRows(n);
    const MatrixD through = source.o.weight.middleCols(h * w, w).cast<double>() * up.bottomRows(w);
    out.keys += (effects.known() ? effects.score_effect(h) : 1) * wanted.transpose() * wanted /
                static_cast<double>(asked.rows());
    out.values += (effects.known() ? effects.mass_square(h) : 1) * through.transpose() * through;
  }
  return out;
}

// The eigenvalues of S^½ M² S^½.
VectorD losses_of(const MatrixD& metric, const MatrixD& covariance) {
  const MatrixD root = symmetric_root(covariance, 0).root;
  return symmetric_eigenpairs(root * metric * root).values;
}

// Without a norm the covariance is that of the latents themselves. Effects that are not known: each metric
// divided by its trace against it.
TEST(FromMla, LosesTheLeastWeighedError) {
  const MlaSample sample = mla_sample(5, false, true);
  for (const Index rank : {1, 3, 5, 7}) {
    for (const Index groups : {1, 2, 4}) {
      const AbsorbedAttention absorbed = from_mla(sample.layer, sample.moment, sample.query_moment, {},
                                                  {.partition = {groups, 1}, .rank = rank});
      for (const LatentGroup& group : absorbed.groups) {
        const Losses losses = losses_of(sample, absorbed, group);
        const auto [keys, values, covariance] = metrics_of(sample, group, {});
        const double expected =
            losses_of(keys / (keys * covariance).trace() + values / (values * covariance).trace(), covariance)
                .tail(8 - rank)
                .sum();
        // Sums of float32 queries and latents.
        EXPECT_NEAR((losses.key + losses.value) / expected, 1, 1e-4) << rank << " " << groups;
      }
    }
  }
}

TEST(FromMla, WithKnownEffectsLosesTheLeastErrorOfTheOutput) {
  const MlaSample sample = mla_sample(5, false, true);
  Random random(51);
  const HeadEffects effects{random.matrix_d(6, 1).cwiseAbs(), random.matrix_d(6, 1).cwiseAbs()};
  for (const Index rank : {1, 3, 5, 7}) {
    const AbsorbedAttention absorbed =
        from_mla(sample.layer, sample.moment, sample.query_moment, effects, {.partition = {}, .rank = rank});
    const LatentGroup& group = absorbed.groups.front();
    const auto [keys, values, covariance] = metrics_of(sample, group, effects);
    const MatrixD metric = keys + values;
    // All latents as the kept ones tell of them.
    const MatrixD all = latents_by_the_book(sample);
    const MatrixD kept = absorbed.latent_of(group) * with_ones(sample.x);
    const MatrixD told = ridge_solve(kept * kept.transpose(), kept * all.transpose(), 0).transpose() * kept;
    const MatrixD missed = all - told;
    const double found = (metric * missed * missed.transpose()).trace() / static_cast<double>(all.cols());
    EXPECT_NEAR(found / losses_of(metric, covariance).tail(8 - rank).sum(), 1, 1e-4) << rank;
  }
}

// Scores of a source with parts read the shared coordinates alone.
TEST(FromMla, KeysAreInWhatIsShared) {
  const MlaSample sample = mla_sample(6, true, true);
  const AbsorbedAttention absorbed = from_mla(sample.layer, sample.moment, sample.query_moment, {},
                                              {.partition = {2, 2}, .rank = 7, .key_rank = 3});
  for (Index h = 0; h < 6; ++h) {
    const LatentGroup& group = testing_support::group_of(absorbed, h);
    const MatrixD& query = absorbed.query[static_cast<std::size_t>(h)];
    for (const LatentPart& part : group.parts) {
      EXPECT_TRUE(query.middleRows(part.query, 3) == query.middleRows(group.parts[0].query, 3));
      EXPECT_FALSE(query.middleRows(part.query, 3).isZero(0));
      EXPECT_TRUE(query.middleRows(part.query + 3, part.rank).isZero(0));
    }
    EXPECT_EQ(absorbed.value_up[static_cast<std::size_t>(h)].cols(), 7);
  }
}

// Every head by its rotary key alone, and every value in what is the parts' own.
TEST(FromMla, MayShareNothing) {
  MlaSample sample = mla_sample(7, true, true);
  // Heads that ask for no content lose nothing then.
  for (Index h = 0; h < 6; ++h) {
    sample.layer.q.weight.middleRows(h * 11, 5).setZero();
  }
  for (const Partition& partition : {Partition{1, 2}, Partition{2, 2}}) {
    EXPECT_LE(lost(sample, {.partition = partition, .rank = 8, .key_rank = 0}), kFloatNoise);
  }
}

TEST(FromMla, ASourceWithoutContentKeepsItsScores) {
  const MlaSample sample = mla_sample(8, true, true, 0);
  EXPECT_LE(lost(sample, {.partition = {1, 1}, .rank = 8}), kFloatNoise);
  EXPECT_LE(lost(sample, {.partition = {2, 1}, .rank = 8}), kFloatNoise);
  EXPECT_LE(lost(sample, {.partition = {1, 2}, .rank = 10, .key_rank = 2}), kFloatNoise);
}

TEST(FromMla, RefusesWhatIsNotMla) {
  Random random(9);
  const MatrixD moment = MatrixD::Identity(25, 25);
  const FromMlaOptions options{.partition = {1, 1}, .rank = 4};
  for (const std::string form : {"gla", "tpla"}) {
    const LatentAttention layer = random_latent(random, {.name = "", .form = form}, hidden);
    EXPECT_THROW(from_mla(layer, moment, moment, {}, options), std::logic_error);
    EXPECT_THROW(mla_value_map(layer), std::logic_error);
  }
  const LatentAttention biased = random_latent(
      random, {.name = "", .form = "mla", .branches = 1, .bias = true, .norm = LatentNorm::branch}, hidden);
  EXPECT_THROW(from_mla(biased, moment, moment, {}, options), std::logic_error);
}

// Scores and values in latent space: the layer's own output.
TEST(MlaProjections, AreTheLayer) {
  for (const bool norm : {false, true}) {
    for (const bool low_rank_query : {false, true}) {
      const MlaSample sample = mla_sample(10, norm, low_rank_query);
      const LatentAttention& layer = sample.layer;
      const MlaProjections found = project(layer, sample.x, RotaryTable(layer.rotary, sample.x.rows()));
      const Index width = 6 + 8;
      ASSERT_EQ(found.query.cols(), 6 * width);
      ASSERT_EQ(found.key.cols(), width);
      const MatrixD query = found.query.cast<double>();
      const MatrixD key = found.key.cast<double>();
      EXPECT_LE(relative_error(key.rightCols(8), latents_by_the_book(sample).transpose()), kFloatNoise);
      const MatrixD through = mla_value_map(layer).cast<double>();
      ASSERT_EQ(through.rows(), hidden);
      ASSERT_EQ(through.cols(), 6 * 8);
      MatrixD out = MatrixD::Zero(sample.x.rows(), hidden);
      for (Index h = 0; h < 6; ++h) {
        out += testing_support::attend_by_the_book(
                   sample.x.rows(), 0,
                   [&](Index m, Index n) {
                     return static_cast<double>(layer.scale) *
                            query.row(m).segment(h * width, width).dot(key.row(n));
                   },
                   [&](Index n) -> VectorD { return key.row(n).tail(8).transpose(); }) *
               through.middleCols(h * 8, 8).transpose();
      }
      if (layer.o.bias.size() > 0) {
        out.rowwise() += layer.o.bias.cast<double>();
      }
      EXPECT_LE(relative_error(out, output_by_the_book(layer, sample.x)), kFloatNoise);
    }
  }
}

TEST(MlaValueMap, IsTheProductOfValuesAndOutput) {
  const MlaSample sample = mla_sample(11, true, false);
  const MatrixD found = mla_value_map(sample.layer).cast<double>();
  for (Index h = 0; h < 6; ++h) {
    const MatrixD up = sample.layer.branches[0].up.middleRows(h * 12 + 5, 7).cast<double>();
    EXPECT_LE(relative_error(found.middleCols(h * 8, 8),
                             sample.layer.o.weight.middleCols(h * 7, 7).cast<double>() * up),
              kFloatNoise);
  }
}

}  // namespace
}  // namespace relatent
