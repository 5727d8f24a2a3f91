#include "convert/latent/transmla.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/latent/assemble.h"
#include "linalg/decompose.h"
#include "tests/support/expect_error.h"
#include "tests/support/reference.h"
#include "tests/support/samples.h"
#include "tests/support/trained_layer.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::layer_sample;
using testing_support::LayerSample;
using testing_support::output_of;
using testing_support::relative_error;
using testing_support::rotated;
using testing_support::trained_layer;

TEST(Transmla, SizesThatFit) {
  struct Case {
    Index rope_dim;
    Index fold;
    Index head_dim;
    std::string complaint;  // empty for a fit
  };
  for (const Case& test : {
           Case{8, 1, 8, ""},
           Case{8, 2, 8, ""},
           Case{8, 4, 8, ""},
           Case{4, 2, 8, ""},
           Case{2, 4, 8, ""},
           Case{64, 4, 128, ""},
           Case{0, 1, 8, "--rope-dim 0"},
           Case{-2, 1, 8, "--rope-dim -2"},
           Case{3, 1, 9, "--rope-dim 3"},
           Case{6, 1, 8, "--rope-dim 6 does not divide the head size 8"},
           Case{16, 1, 8, "--rope-dim 16"},
           Case{8, 0, 8, "--fold 0"},
           Case{8, -1, 8, "--fold -1"},
           Case{8, 3, 8, "--fold 3"},
           Case{8, 8, 8, "--fold 8"},
           Case{4, 1, 8, "--fold 1 must be a multiple of head size / rotary size = 2"},
           Case{2, 2, 8, "--fold 2"},
       }) {
    SCOPED_TRACE(std::to_string(test.rope_dim) + " " + std::to_string(test.fold));
    const TransmlaOptions options{.rope_dim = test.rope_dim, .fold = test.fold};
    if (test.complaint.empty()) {
      EXPECT_NO_THROW(check_transmla(options, test.head_dim));
      continue;
    }
    expect_error(ErrorKind::usage, {test.complaint}, [&] { check_transmla(options, test.head_dim); });
    if (test.head_dim == 8) {
      expect_error(ErrorKind::usage, {test.complaint}, [&] {
        const LayerSample sample = layer_sample(1);
        transmla_rotary_key(sample.maps, sample.moments, options);
      });
    }
  }
}

TEST(Transmla, RotaryKeyAndLeftoverShareOutTheKey) {
  const LayerSample sample = layer_sample(2, {.attention_factor = 1.25F});
  for (const auto& [p, fold] : {std::pair<Index, Index>{8, 1}, {8, 2}, {8, 4}, {4, 2}, {4, 4}, {2, 4}}) {
    SCOPED_TRACE(std::to_string(p) + " " + std::to_string(fold));
    const TransmlaKey found = transmla_rotary_key(sample.maps, sample.moments, {.rope_dim = p, .fold = fold});
    const RotaryKey& key = found.key;
    EXPECT_EQ(key.rope_dim(), p);
    EXPECT_EQ(key.nope_dim(), 8);
    ASSERT_EQ(found.leftover.rows(), 16 - p);
    ASSERT_EQ(found.leftover.cols(), 16);
    MatrixD all(16, 16);
    all << key.read, found.leftover;
    EXPECT_LE((all * all.transpose() - MatrixD::Identity(16, 16)).norm(), 1e-12);
    EXPECT_LE((key.residual - found.leftover.transpose() * found.leftover).norm(), 1e-12);
    EXPECT_EQ(key.rotary.attention_factor, 1.25F);
    // Every (d / p)-th frequency, and each row of the key mixes one fold alone, real and imaginary parts
    // alike.
    const Index collapse = 8 / p;
    ASSERT_EQ(static_cast<Index>(key.rotary.inv_freq.size()), p / 2);
    for (Index pair = 0; pair < p / 2; ++pair) {
      EXPECT_EQ(key.rotary.inv_freq[static_cast<std::size_t>(pair)],
                sample.maps.rotary.inv_freq[static_cast<std::size_t>(pair * collapse)]);
      for (Index column = 0; column < 16; ++column) {
        const Index f = column % 8 % 4;
        const bool imaginary = column % 8 >= 4;
        const bool in_fold = f / fold == pair * collapse / fold;
        if (imaginary || !in_fold) {
          EXPECT_EQ(key.read(pair, column), 0) << pair << " " << column;
        } else {
          EXPECT_EQ(key.read(pair, column), key.read(pair + p / 2, column + 4)) << pair << " " << column;
        }
      }
    }
    for (Index h = 0; h < 6; ++h) {
      const auto at = static_cast<std::size_t>(h);
      EXPECT_TRUE(key.query[at] == key.read.middleCols(h / 3 * 8, 8));
      EXPECT_TRUE(key.content_query[at] == MatrixD::Identity(8, 8));
    }
  }
}

// The kept coordinates of a fold carry the most of both parts' energy that any as many orthonormal ones can.
TEST(Transmla, KeepsTheLeadingDirectionsOfEveryFold) {
  const LayerSample sample = layer_sample(3, {.kv_bias = true});
  const MatrixD moment = second_moment(sample.maps.k, sample.moments);
  for (const Index fold : {1, 2, 4}) {
    const TransmlaKey found = transmla_rotary_key(sample.maps, sample.moments, {.rope_dim = 8, .fold = fold});
    const MatrixD kept = found.key.read * moment * found.key.read.transpose();
    for (Index first = 0; first < 4; first += fold) {
      MatrixD both(2 * fold, 2 * fold);
      const auto column = [&](Index i) { return i / fold * 8 + first + i % fold; };
      for (Index i = 0; i < 2 * fold; ++i) {
        for (Index j = 0; j < 2 * fold; ++j) {
          both(i, j) = moment(column(i), column(j)) + moment(column(i) + 4, column(j) + 4);
        }
      }
      const VectorD values = symmetric_eigenpairs(both, fold).values;
      for (Index c = 0; c < fold; ++c) {
        EXPECT_NEAR(kept(first + c, first + c) + kept(first + c + 4, first + c + 4), values(c),
                    1e-12 * values(0));
      }
    }
  }
}

// Scores as the paper has them: the kept coordinates rotate at the list's frequencies, the leftover does not.
MatrixD mix_by_definition(const LayerSample& sample, const RotaryKey& key) {
  const LayerMaps& maps = sample.maps;
  const Index d = maps.head_dim;
  const MatrixD columns = testing_support::with_ones(sample.x);
  const MatrixD q = map_of(maps.q) * columns;
  const MatrixD k = maps.k * columns;
  const MatrixD v = maps.v * columns;
  const MatrixD left = key.residual * k;
  MatrixD out(sample.x.rows(), maps.heads * d);
  for (Index h = 0; h < maps.heads; ++h) {
    const Index g = maps.group_of(h) * d;
    const MatrixD read_query = key.read.middleCols(g, d);
    out.middleCols(h * d, d) = testing_support::attend_by_the_book(
        sample.x.rows(), 0,
        [&](Index m, Index n) {
          const VectorD query = q.col(m).segment(h * d, d);
          return maps.scale * (rotated(key.rotary, m, read_query * query)
                                   .dot(rotated(key.rotary, n, key.read * k.col(n))) +
                               query.dot(left.col(n).segment(g, d)));
        },
        [&](Index n) -> VectorD { return v.col(n).segment(g, d); });
  }
  return out;
}

TEST(Transmla, AtFullRankTheLatentHoldsLeftoverAndValues) {
  for (const double balance : {0.0, 1.0, 3.0}) {
    for (const Index p : {8, 4}) {
      SCOPED_TRACE(std::to_string(balance) + " " + std::to_string(p));
      const LayerSample sample = layer_sample(4, {.q_bias = true, .kv_bias = true, .o_bias = true});
      const TransmlaOptions options{.rope_dim = p, .fold = 2, .balance = balance};
      const TransmlaKey key = transmla_rotary_key(sample.maps, sample.moments, options);
      const JointLatent latent = transmla_latent(sample.maps, sample.moments, key, options, 32 - p);
      EXPECT_LE(relative_error(latent.key_up * latent.down, key.key.residual * sample.maps.k), 1e-12);
      EXPECT_LE(relative_error(latent.value_up * latent.down, sample.maps.v), 1e-12);
      EXPECT_TRUE(latent.value_shift.isZero(0));
      const LatentAttention layer = assemble_mla(sample.maps, sample.moments, key.key, latent, {});
      EXPECT_LE(relative_error(attention_forward(layer, sample.x, RotaryTable(layer.rotary, sample.x.rows())),
                               mix_by_definition(sample, key.key)),
                kFloatNoise);
    }
  }
}

// One group has nothing to mix, so every frequency keeps its rotation and nothing is left over.
TEST(Transmla, OneGroupReturnsTheSource) {
  const LayerSample sample = layer_sample(5, {.heads = 3, .kv_heads = 1, .q_bias = true, .kv_bias = true});
  const TransmlaOptions options{.rope_dim = 8};
  const TransmlaKey key = transmla_rotary_key(sample.maps, sample.moments, options);
  EXPECT_EQ(key.leftover.rows(), 0);
  EXPECT_LE(key.key.residual.norm(), 1e-12);
  const JointLatent latent = transmla_latent(sample.maps, sample.moments, key, options, 8);
  const LatentAttention layer = assemble_mla(sample.maps, sample.moments, key.key, latent, {});
  EXPECT_LE(relative_error(output_of(layer, sample.x), output_of(sample.attention, sample.x)), kFloatNoise);
}

double energy(const MatrixD& map, const LayerSample& sample) {
  return second_moment(map, sample.moments).trace();
}

TEST(Transmla, ErrorFallsWithTheRank) {
  for (const LayerSample& sample : {layer_sample(6), trained_layer(1)}) {
    const Index d = sample.maps.head_dim;
    const Index full = 2 * sample.maps.key_dim() - d;
    const TransmlaOptions options{.rope_dim = d, .balance = 0};
    const TransmlaKey key = transmla_rotary_key(sample.maps, sample.moments, options);
    double before = INFINITY;
    for (const Index rank : {full / 8, full / 4, full / 2, 3 * full / 4}) {
      const JointLatent latent = transmla_latent(sample.maps, sample.moments, key, options, rank);
      EXPECT_EQ(latent.down.rows(), rank);
      const double error = energy(key.key.residual * sample.maps.k - latent.key_up * latent.down, sample) +
                           energy(sample.maps.v - latent.value_up * latent.down, sample);
      EXPECT_LT(error, before) << rank;
      before = error;
    }
    EXPECT_GT(before, 0);
  }
}

// How the latent weighs keys against values, read off a full-rank latent, whose eigenvectors are orthonormal.
double ratio_of(const LayerSample& sample, const TransmlaKey& key, const TransmlaOptions& options) {
  const JointLatent latent = transmla_latent(sample.maps, sample.moments, key, options,
                                             2 * sample.maps.key_dim() - options.rope_dim);
  const MatrixD scaled = key.leftover * latent.key_up;
  return std::sqrt(scaled.squaredNorm() / static_cast<double>(scaled.rows()));
}

TEST(Transmla, BalanceBringsKeysToTheSizeOfValues) {
  const LayerSample sample = layer_sample(7, {.kv_bias = true});
  TransmlaOptions options{.rope_dim = 8};
  const TransmlaKey key = transmla_rotary_key(sample.maps, sample.moments, options);
  const auto mean_root = [&](const MatrixD& map) {
    return second_moment(map, sample.moments).diagonal().cwiseSqrt().mean();
  };
  // The first rope_dim values are left out.
  const double values = mean_root(sample.maps.v.bottomRows(sample.maps.v.rows() - 8));
  const double keys = mean_root(key.leftover * sample.maps.k);
  for (const double balance : {0.5, 1.0, 4.0}) {
    options.balance = balance;
    EXPECT_NEAR(ratio_of(sample, key, options) * balance * values / keys, 1, 1e-12);
  }
  options.balance = 0;
  EXPECT_NEAR(ratio_of(sample, key, options), 1, 1e-12);
}

TEST(Transmla, BalanceChangesWhatIsKept) {
  const LayerSample sample = layer_sample(8);
  TransmlaOptions options{.rope_dim = 8};
  const TransmlaKey key = transmla_rotary_key(sample.maps, sample.moments, options);
  double keys_before = INFINITY;
  double values_before = -1;
  for (const double balance : {0.1, 1.0, 10.0}) {
    options.balance = balance;
    const JointLatent latent = transmla_latent(sample.maps, sample.moments, key, options, 8);
    const double keys = energy(key.key.residual * sample.maps.k - latent.key_up * latent.down, sample);
    const double values = energy(sample.maps.v - latent.value_up * latent.down, sample);
    EXPECT_LT(keys, keys_before) << balance;
    EXPECT_GT(values, values_before) << balance;
    keys_before = keys;
    values_before = values;
  }
}

TEST(Transmla, FullRankQueryIsExact) {
  for (const bool bias : {false, true}) {
    const LayerSample sample = layer_sample(9, {.q_bias = bias});
    const LowRankQuery full = transmla_query(sample.maps, sample.moments, 48);
    EXPECT_LE(relative_error(full.lift * full.down, map_of(sample.maps.q)), 1e-12);
    // The queries are maps of 24 numbers and a constant, so no more directions than that have any energy.
    const LowRankQuery enough = transmla_query(sample.maps, sample.moments, 25);
    EXPECT_LE(relative_error(enough.lift * enough.down, map_of(sample.maps.q)), 1e-7);
    double before = INFINITY;
    for (const Index rank : {4, 8, 16, 24}) {
      const LowRankQuery query = transmla_query(sample.maps, sample.moments, rank);
      EXPECT_EQ(query.down.rows(), rank);
      EXPECT_EQ(query.lift.cols(), rank);
      EXPECT_LE((query.lift.transpose() * query.lift - MatrixD::Identity(rank, rank)).norm(), 1e-12);
      const double error = energy(map_of(sample.maps.q) - query.lift * query.down, sample);
      EXPECT_LT(error, before) << rank;
      before = error;
    }
  }
}

}  // namespace
}  // namespace relatent
