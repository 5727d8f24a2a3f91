#include "convert/latent/joint_latent.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "convert/forms/mla.h"
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
    const MatrixD o = maps.o.middleCols(h * d, d);
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
      const MatrixD o = maps.o.middleCols(h * maps.head_dim, maps.head_dim);
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

TEST(JointLatent, LambdaTradesKeysForValues) {
  const LayerSample sample = layer_sample(4);
  const RotaryKey key = some_key(sample, 3);
  Errors before{2, 0};
  for (const double lambda : {0.1, 0.5, 1.0, 2.0, 10.0}) {
    const JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = 8, .lambda = lambda});
    const Errors errors = errors_of(sample, key, latent);
    EXPECT_LT(errors.key, before.key) << lambda;
    EXPECT_GT(errors.value, before.value) << lambda;
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
  expected.rowwise() += (shifted.o * by_head).transpose();
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

}  // namespace
}  // namespace relatent
