#include "convert/latent/joint_latent.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "convert/latent/assemble.h"
#include "convert/latent/rotary_key.h"
#include "linalg/decompose.h"
#include "tests/support/samples.h"
#include "tests/support/trained_layer.h"

namespace relatent {
namespace {

using testing_support::gqa_samples;
using testing_support::GqaSample;
using testing_support::kFloatNoise;
using testing_support::layer_sample;
using testing_support::LayerSample;
using testing_support::output_of;
using testing_support::Random;
using testing_support::relative_error;
using testing_support::trained_layer;
using testing_support::with_ones;

// A rotary key of `pairs` components, the rest of the keys left over.
RotaryKey some_key(const LayerSample& sample, Index pairs) {
  const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
  [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
  const Concentration concentration = concentrate(sample.maps, sample.moments, dropped);
  return rotary_key(sample.maps, concentration, dropped, allocate_components({concentration}, 2 * pairs));
}

// A map whose outputs have mean zero.
MatrixD centred(const MatrixD& map, const Moments& moments) {
  MatrixD out = map;
  out.rightCols<1>() -= map * moments.second.rightCols<1>();
  return out;
}

TEST(JointLatent, AtFullRankReproducesKeysAndValues) {
  for (const GqaSample& shape : gqa_samples()) {
    SCOPED_TRACE(shape.name);
    const LayerSample sample = layer_sample(1, shape);
    const Index keys = sample.maps.key_dim();
    const RotaryKey key = some_key(sample, keys / 4);
    const JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = 2 * keys});
    EXPECT_EQ(latent.down.rows(), 2 * keys);
    EXPECT_EQ(latent.key_up.rows(), keys);
    EXPECT_EQ(latent.value_up.rows(), keys);
    MatrixD values = latent.value_up * latent.down;
    values.rightCols<1>() += latent.value_shift;
    // The square root of a moment may be as ill-conditioned as 1e4, its floor.
    EXPECT_LE(relative_error(values, sample.maps.v), 1e-8);
    EXPECT_LE(
        relative_error(latent.key_up * latent.down, centred(key.residual * sample.maps.k, sample.moments)),
        1e-8);
  }
}

TEST(JointLatent, WithEveryComponentAndFullRankReturnsTheSource) {
  std::vector<LayerSample> samples = {trained_layer(0), trained_layer(3)};
  for (const GqaSample& shape : gqa_samples()) {
    samples.push_back(layer_sample(2, shape));
  }
  for (const LayerSample& sample : samples) {
    const Index keys = sample.maps.key_dim();
    const RotaryKey key = some_key(sample, keys / 2);
    const JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = 2 * keys});
    const LatentAttention layer = assemble_mla(sample.maps, sample.moments, key, latent, {});
    EXPECT_LE(relative_error(output_of(layer, sample.x), output_of(sample.attention, sample.x)), kFloatNoise);
  }
}

// Nothing is left of the keys but rounding errors, and those deserve no rank: the values need half of the
// full one.
TEST(JointLatent, RoundingErrorsInKeysTakeNoRank) {
  for (const LayerSample& sample : {layer_sample(2), layer_sample(2, {.kv_bias = true}), trained_layer(0)}) {
    const Index keys = sample.maps.key_dim();
    const RotaryKey key = some_key(sample, keys / 2);
    const JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = keys});
    const LatentAttention layer = assemble_mla(sample.maps, sample.moments, key, latent, {});
    EXPECT_LE(relative_error(output_of(layer, sample.x), output_of(sample.attention, sample.x)), kFloatNoise);
  }
}

struct Errors {
  double key = 0;    // E|q̃ · δk|² summed over heads, in units of what all leftover keys contribute
  double value = 0;  // E|W_O δv|² likewise
};

Errors errors_of(const LayerSample& sample, const RotaryKey& key, const JointLatent& latent) {
  const LayerMaps& maps = sample.maps;
  const Index d = maps.head_dim;
  const MatrixD r = centred(key.residual * maps.k, sample.moments);
  const MatrixD v = centred(maps.v, sample.moments);
  const MatrixD all_r = second_moment(r, sample.moments);
  const MatrixD all_v = second_moment(v, sample.moments);
  const MatrixD lost_r = second_moment(r - latent.key_up * latent.down, sample.moments);
  const MatrixD lost_v = second_moment(v - latent.value_up * latent.down, sample.moments);
  Errors lost;
  Errors all;
  for (Index h = 0; h < maps.heads; ++h) {
    const Index g = maps.group_of(h) * d;
    const MatrixD query =
        second_moment(key.content_query[static_cast<std::size_t>(h)] * maps.query_of(h), sample.moments);
    const MatrixD o = maps.output_of(h);
    lost.key += (query * lost_r.block(g, g, d, d)).trace();
    all.key += (query * all_r.block(g, g, d, d)).trace();
    lost.value += (o * lost_v.block(g, g, d, d) * o.transpose()).trace();
    all.value += (o * all_v.block(g, g, d, d) * o.transpose()).trace();
  }
  return {lost.key / all.key, lost.value / all.value};
}

// Σ over heads of a head's metric, in the block of its group.
MatrixD by_group(const LayerMaps& maps, const std::function<MatrixD(Index)>& metric_of_head) {
  MatrixD out = MatrixD::Zero(maps.key_dim(), maps.key_dim());
  for (Index h = 0; h < maps.heads; ++h) {
    const Index g = maps.group_of(h) * maps.head_dim;
    out.block(g, g, maps.head_dim, maps.head_dim) += metric_of_head(h);
  }
  return out;
}

// No map of that rank loses less: its loss is the sum of the smallest eigenvalues of metric times covariance.
TEST(JointLatent, LosesTheLeastWeighedError) {
  const std::vector<LayerSample> samples = {layer_sample(3, {.kv_bias = true}), trained_layer(1)};
  for (const LayerSample& sample : samples) {
    const LayerMaps& maps = sample.maps;
    const Index keys = maps.key_dim();
    const RotaryKey key = some_key(sample, keys / 4);
    MatrixD y(2 * keys, maps.k.cols());
    y << key.residual * maps.k, maps.v;
    const MatrixD covariance = second_moment(centred(y, sample.moments), sample.moments);
    MatrixD metric = MatrixD::Zero(2 * keys, 2 * keys);
    metric.topLeftCorner(keys, keys) = by_group(maps, [&](Index h) {
      return second_moment(key.content_query[static_cast<std::size_t>(h)] * maps.query_of(h), sample.moments);
    });
    metric.bottomRightCorner(keys, keys) = by_group(maps, [&](Index h) {
      const MatrixD o = maps.output_of(h);
      return MatrixD(o.transpose() * o);
    });
    for (const Index at : {Index{0}, keys}) {
      auto block = metric.block(at, at, keys, keys);
      block /= (block * covariance.block(at, at, keys, keys)).trace();
    }
    const MatrixD root = symmetric_root(covariance, 0).root;
    const VectorD losses = symmetric_eigenpairs(root * metric * root).values;
    for (const Index rank : {keys / 8, keys / 4, keys / 2, keys, 3 * keys / 2, 2 * keys}) {
      const Errors errors = errors_of(sample, key, joint_latent(maps, sample.moments, key, {.rank = rank}));
      EXPECT_NEAR(errors.key + errors.value, losses.tail(2 * keys - rank).sum(), 1e-6) << rank;
    }
  }
}

TEST(JointLatent, TheKeyWeightMovesErrorsFromKeysToValues) {
  const LayerSample sample = trained_layer(1);
  const RotaryKey key = some_key(sample, 16);
  Errors before{};
  for (const double weight : {0.5, 1.0, 2.0}) {
    const Errors errors = errors_of(
        sample, key, joint_latent(sample.maps, sample.moments, key, {.rank = 64, .key_weight = weight}));
    if (before.key > 0) {
      EXPECT_LT(errors.key, before.key) << weight;
      EXPECT_GT(errors.value, before.value) << weight;
    }
    before = errors;
  }
}

TEST(JointLatent, AttentionErrorOfATrainedLayerFallsWithTheRank) {
  const LayerSample sample = trained_layer(2);
  const MatrixF expected = output_of(sample.attention, sample.x);
  const RotaryKey key = some_key(sample, 32);
  double before = 1;
  for (const Index rank : {16, 32, 64, 128, 256}) {
    const JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = rank});
    const double error = relative_error(
        output_of(assemble_mla(sample.maps, sample.moments, key, latent, {}), sample.x), expected);
    EXPECT_LT(error, before) << rank;
    before = error;
  }
  // What is left is the rotation of the components that were not kept.
  EXPECT_GT(before, 1e-4);
}

// Errors in the output to first order, of heads whose effects are known: Σ_h κ s² E|q̃ · δk|² and
// Σ_h β E|W_O δv|².
Errors weighed_errors_of(const LayerSample& sample, const RotaryKey& key, const JointLatent& latent) {
  const LayerMaps& maps = sample.maps;
  const Index d = maps.head_dim;
  const auto lost = [&](const MatrixD& map, const MatrixD& found) {
    return second_moment(centred(map, sample.moments) - found, sample.moments);
  };
  const MatrixD lost_r = lost(key.residual * maps.k, latent.key_up * latent.down);
  const MatrixD lost_v = lost(maps.v, latent.value_up * latent.down);
  Errors out;
  for (Index h = 0; h < maps.heads; ++h) {
    const Index g = maps.group_of(h) * d;
    const MatrixD query = second_moment(key.content_query[static_cast<std::size_t>(h)] * maps.query_of(h),
                                        sample.moments.asking());
    const MatrixD o = maps.output_of(h);
    out.key += sample.moments.effects.score_effect(h) * maps.scale * maps.scale *
               (query * lost_r.block(g, g, d, d)).trace();
    out.value +=
        sample.moments.effects.mass_square(h) * (o * lost_v.block(g, g, d, d) * o.transpose()).trace();
  }
  return out;
}

// No map of that rank loses less: its loss is the sum of the smallest
// eigenvalues of metric times covariance. Queries have moments of their own.
TEST(JointLatent, WithKnownEffectsLosesTheLeastErrorOfTheOutput) {
  LayerSample sample = layer_sample(3, {.kv_bias = true});
  const LayerMaps& maps = sample.maps;
  const Index keys = maps.key_dim();
  Random random(31);
  sample.moments.effects = {random.matrix_d(maps.heads, 1).cwiseAbs(),
                            random.matrix_d(maps.heads, 1).cwiseAbs()};
  const MatrixD others = with_ones(random.matrix(50, maps.k.cols() - 1));
  sample.moments.equal = others * others.transpose() / 50;
  const RotaryKey key = some_key(sample, keys / 4);
  MatrixD y(2 * keys, maps.k.cols());
  y << key.residual * maps.k, maps.v;
  const MatrixD covariance = second_moment(centred(y, sample.moments), sample.moments);
  MatrixD metric = MatrixD::Zero(2 * keys, 2 * keys);
  const HeadEffects& effects = sample.moments.effects;
  metric.topLeftCorner(keys, keys) = by_group(maps, [&](Index h) {
    return MatrixD(effects.score_effect(h) * maps.scale * maps.scale *
                   second_moment(key.content_query[static_cast<std::size_t>(h)] * maps.query_of(h),
                                 sample.moments.asking()));
  });
  metric.bottomRightCorner(keys, keys) = by_group(maps, [&](Index h) {
    const MatrixD o = maps.output_of(h);
    return MatrixD(effects.mass_square(h) * o.transpose() * o);
  });
  const MatrixD root = symmetric_root(covariance, 0).root;
  const VectorD losses = symmetric_eigenpairs(root * metric * root).values;
  for (const Index rank : {keys / 8, keys / 2, keys, 3 * keys / 2}) {
    const Errors errors =
        weighed_errors_of(sample, key, joint_latent(maps, sample.moments, key, {.rank = rank}));
    EXPECT_NEAR(errors.key + errors.value, losses.tail(2 * keys - rank).sum(), 1e-9 * losses.sum()) << rank;
  }
}

// Where errors of scores do more, keys get more of the latent.
TEST(JointLatent, EffectsTradeKeysForValues) {
  LayerSample sample = layer_sample(4);
  const RotaryKey key = some_key(sample, 3);
  Errors before{INFINITY, 0};
  for (const double effect : {0.01, 0.1, 1.0, 10.0, 100.0}) {
    sample.moments.effects = {VectorD::Ones(sample.maps.heads), VectorD::Constant(sample.maps.heads, effect)};
    const Errors errors = errors_of(sample, key, joint_latent(sample.maps, sample.moments, key, {.rank = 8}));
    EXPECT_LT(errors.key, before.key) << effect;
    EXPECT_GT(errors.value, before.value) << effect;
    before = errors;
  }
}

// A constant in a value comes out of the attention unchanged and costs no rank, however large it is.
TEST(JointLatent, ConstantsInValuesAreCarriedBesideTheLatent) {
  LayerSample sample = layer_sample(5, {.kv_bias = true});
  const RotaryKey key = some_key(sample, 4);
  const auto converted = [&](const LayerMaps& maps) {
    const JointLatent latent = joint_latent(maps, sample.moments, key, {.rank = 6});
    return assemble_mla(maps, sample.moments, key, latent, {});
  };
  const MatrixF before = output_of(converted(sample.maps), sample.x);
  LayerMaps shifted = sample.maps;
  const VectorD constant = VectorD::LinSpaced(16, -100, 250);
  shifted.v.rightCols<1>() += constant;
  const MatrixF after = output_of(converted(shifted), sample.x);
  VectorD by_head(48);
  for (Index h = 0; h < 6; ++h) {
    by_head.segment(h * 8, 8) = constant.segment(h / 3 * 8, 8);
  }
  MatrixD expected = before.cast<double>();
  expected.rowwise() += (shifted.o.cast<double>() * by_head).transpose();
  EXPECT_LE(relative_error(after, expected), kFloatNoise);
  // The differences between positions too, which the constant dwarfs a hundredfold.
  const auto spread = [](const MatrixD& m) { return MatrixD(m.rowwise() - m.colwise().mean()); };
  EXPECT_LE(relative_error(spread(after.cast<double>()), spread(before.cast<double>())), 1000 * kFloatNoise);
  EXPECT_NEAR(errors_of({sample.attention, sample.x, shifted, sample.moments}, key,
                        joint_latent(shifted, sample.moments, key, {.rank = 6}))
                  .value,
              errors_of(sample, key, joint_latent(sample.maps, sample.moments, key, {.rank = 6})).value,
              1e-9);
}

// A constant in a leftover key adds the same to every score of a query, which the softmax does not see.
TEST(JointLatent, ConstantsInLeftoverKeysCostNothing) {
  const LayerSample sample = layer_sample(6, {.kv_bias = true});
  const RotaryKey key = some_key(sample, 4);
  const JointLatent before = joint_latent(sample.maps, sample.moments, key, {.rank = 6});
  LayerMaps shifted = sample.maps;
  shifted.k.rightCols<1>() += VectorD::LinSpaced(16, -100, 250);
  const JointLatent after = joint_latent(shifted, sample.moments, key, {.rank = 6});
  EXPECT_LE(relative_error(after.down, before.down), 1e-8);
  EXPECT_LE(relative_error(after.key_up, before.key_up), 1e-8);
  EXPECT_LE(relative_error(after.value_up, before.value_up), 1e-8);
  // And the attention is that of keys with their constant.
  const JointLatent full = joint_latent(shifted, sample.moments, key, {.rank = 32});
  JointLatent uncentred = full;
  uncentred.down = MatrixD(32, 25);
  uncentred.down << key.residual * shifted.k, shifted.v;
  uncentred.key_up = MatrixD::Identity(16, 32);
  uncentred.value_up = MatrixD::Zero(16, 32);
  uncentred.value_up.rightCols(16).setIdentity();
  uncentred.value_shift = VectorD::Zero(16);
  // Scores of a hundred and more lose digits that centred ones keep.
  EXPECT_LE(relative_error(output_of(assemble_mla(shifted, sample.moments, key, full, {}), sample.x),
                           output_of(assemble_mla(shifted, sample.moments, key, uncentred, {}), sample.x)),
            100 * kFloatNoise);
}

TEST(JointLatent, KeysReadOnlyTheFirstCoordinates) {
  for (const LayerSample& sample : {layer_sample(7, {.kv_bias = true}), trained_layer(1)}) {
    const Index keys = sample.maps.key_dim();
    const RotaryKey key = some_key(sample, keys / 4);
    for (const Index key_rank : {Index{1}, keys / 4, keys / 2}) {
      const Index rank = key_rank + keys / 4;
      const JointLatent latent =
          joint_latent(sample.maps, sample.moments, key, {.rank = rank, .key_rank = key_rank});
      EXPECT_EQ(latent.key_rank, key_rank);
      EXPECT_EQ(latent.rank(), rank);
      EXPECT_TRUE(latent.key_up.rightCols(rank - key_rank).isZero(0));
      for (Index i = 0; i < rank; ++i) {
        EXPECT_FALSE(latent.down.row(i).isZero(0)) << i;
        EXPECT_FALSE(latent.value_up.col(i).isZero(0)) << i;
        EXPECT_EQ(latent.key_up.col(i).isZero(0), i >= key_rank) << i;
      }
      // As many more coordinates make values better and leave keys as they are.
      const JointLatent more =
          joint_latent(sample.maps, sample.moments, key, {.rank = rank + keys / 4, .key_rank = key_rank});
      const Errors before = errors_of(sample, key, latent);
      const Errors after = errors_of(sample, key, more);
      EXPECT_NEAR(after.key, before.key, 1e-9);
      EXPECT_LT(after.value, before.value);
    }
    // All that keys may read is all.
    EXPECT_EQ(joint_latent(sample.maps, sample.moments, key, {.rank = keys, .key_rank = keys}).key_rank,
              std::nullopt);
  }
}

// What is left to say of the values is said in the fewest coordinates: their loss is the smallest eigenvalues
// of metric times the covariance of what the first leave.
TEST(JointLatent, BeyondTheKeysLosesTheLeastOfTheValues) {
  const LayerSample sample = layer_sample(8, {.kv_bias = true});
  const LayerMaps& maps = sample.maps;
  const RotaryKey key = some_key(sample, 3);
  for (const Index key_rank : {0, 2, 5}) {
    const MatrixD v = centred(maps.v, sample.moments);
    const MatrixD metric = by_group(maps, [&](Index h) {
      const MatrixD o = maps.output_of(h);
      return MatrixD(o.transpose() * o);
    });
    for (const Index own : {1, 6, 16}) {
      const JointLatent latent =
          joint_latent(maps, sample.moments, key, {.rank = key_rank + own, .key_rank = key_rank});
      const MatrixD left = v - latent.value_up.leftCols(key_rank) * latent.down.topRows(key_rank);
      const MatrixD covariance = second_moment(left, sample.moments);
      const MatrixD root = symmetric_root(covariance, 0).root;
      const VectorD losses = symmetric_eigenpairs(root * metric * root).values;
      const double whole = (metric * second_moment(v, sample.moments)).trace();
      EXPECT_NEAR(errors_of(sample, key, latent).value, losses.tail(16 - own).sum() / whole, 1e-6)
          << key_rank << " " << own;
    }
  }
}

TEST(JointLatent, AtFullKeyRankAndRankReturnsTheSource) {
  for (const GqaSample& shape : gqa_samples()) {
    SCOPED_TRACE(shape.name);
    const LayerSample sample = layer_sample(9, shape);
    const Index keys = sample.maps.key_dim();
    const RotaryKey whole = some_key(sample, keys / 2);
    const RotaryKey half = some_key(sample, keys / 4);
    // Everything in what is shared, and more coordinates than there are values left.
    for (const Index more : {Index{1}, keys, keys + 3}) {
      const JointLatent latent =
          joint_latent(sample.maps, sample.moments, half, {.rank = 2 * keys + more, .key_rank = 2 * keys});
      EXPECT_LE(
          relative_error(latent.key_up * latent.down, centred(half.residual * sample.maps.k, sample.moments)),
          1e-6);
      MatrixD values = latent.value_up * latent.down;
      values.rightCols<1>() += latent.value_shift;
      EXPECT_LE(relative_error(values, sample.maps.v), 1e-6);
    }
    // No leftover keys: values alone need a rank.
    for (const Index key_rank : {Index{0}, keys / 2}) {
      const JointLatent latent =
          joint_latent(sample.maps, sample.moments, whole, {.rank = key_rank + keys, .key_rank = key_rank});
      EXPECT_EQ(latent.key_rank, key_rank);
      const LatentAttention layer = assemble_mla(sample.maps, sample.moments, whole, latent, {});
      EXPECT_LE(relative_error(output_of(layer, sample.x), output_of(sample.attention, sample.x)),
                kFloatNoise);
    }
  }
}

// The layer of some heads alone: what they read of keys and values, and nothing else.
LayerMaps heads_of(const LayerMaps& maps, const RotaryKey& key, Index first, Index count) {
  const Index d = maps.head_dim;
  const Index key_first = maps.group_of(first);
  LayerMaps out;
  out.heads = count;
  out.kv_heads = maps.group_of(first + count - 1) + 1 - key_first;
  out.head_dim = d;
  out.q = maps.q.rows(first * d, count * d);
  // The leftover of some keys may lie in all of them.
  out.k = key.residual.middleRows(key_first * d, out.kv_heads * d) * maps.k;
  out.v = maps.v.middleRows(key_first * d, out.kv_heads * d);
  out.o = maps.o.middleCols(first * d, count * d);
  return out;
}

TEST(JointLatent, OfSomeHeadsIsThatOfTheirOwnLayer) {
  const LayerSample sample = layer_sample(10, {.q_bias = true, .kv_bias = true});
  const RotaryKey key = some_key(sample, 3);
  for (const auto& [first, count] :
       std::vector<std::pair<Index, Index>>{{0, 3}, {3, 3}, {1, 2}, {4, 1}, {0, 6}}) {
    for (const std::optional<Index> key_rank : {std::optional<Index>(), std::optional<Index>(4)}) {
      SCOPED_TRACE(std::to_string(count) + " heads from " + std::to_string(first));
      JointLatentOptions options{.rank = 7, .key_rank = key_rank};
      const LayerMaps own = heads_of(sample.maps, key, first, count);
      RotaryKey own_key;
      own_key.content_query.assign(key.content_query.begin() + first,
                                   key.content_query.begin() + first + count);
      own_key.residual = MatrixD::Identity(own.key_dim(), own.key_dim());
      const JointLatent expected = joint_latent(own, sample.moments, own_key, options);
      options.first_head = first;
      options.head_count = count;
      const JointLatent found = joint_latent(sample.maps, sample.moments, key, options);
      EXPECT_EQ(found.first_head, first);
      EXPECT_EQ(found.head_count, count);
      EXPECT_EQ(found.first_kv_head, first / 3);
      EXPECT_EQ(found.key_rank, expected.key_rank);
      EXPECT_LE(relative_error(found.down, expected.down), 1e-9);
      EXPECT_LE(relative_error(found.key_up, expected.key_up), 1e-9);
      EXPECT_LE(relative_error(found.value_up, expected.value_up), 1e-9);
      EXPECT_LE(relative_error(found.value_shift, expected.value_shift), 1e-12);
    }
  }
}

}  // namespace
}  // namespace relatent
