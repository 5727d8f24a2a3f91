#include "convert/latent/lossless.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "convert/latent/assemble.h"
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

void expect_lossless(const LayerSample& sample) {
  const Index keys = sample.maps.key_dim();
  const LatentAttention latent = assemble_mla(sample.maps, sample.moments, lossless_rotary_key(sample.maps),
                                              lossless_latent(sample.maps), {});
  EXPECT_EQ(latent.rope_dim, keys);
  EXPECT_EQ(latent.nope_dim, 0);
  // There are no more independent values than inputs.
  EXPECT_EQ(latent.total_rank(), std::min(keys, sample.maps.v.cols() - 1));
  EXPECT_LE(relative_error(output_of(latent, sample.x), output_of(sample.attention, sample.x)), kFloatNoise);
}

TEST(Lossless, ReturnsTheSource) {
  for (const GqaSample& sample : gqa_samples()) {
    SCOPED_TRACE(sample.name);
    expect_lossless(layer_sample(1, sample, 150));
  }
}

TEST(Lossless, ReturnsATrainedLayer) {
  for (const Index layer : {0, 3}) {
    expect_lossless(trained_layer(layer));
  }
}

TEST(Lossless, KeepsEveryPairOfEveryGroup) {
  const LayerSample sample = layer_sample(2, {.kv_bias = true, .attention_factor = 1.5F});
  const RotaryKey key = lossless_rotary_key(sample.maps);
  EXPECT_EQ(key.rope_dim(), 16);
  EXPECT_EQ(key.nope_dim(), 0);
  EXPECT_EQ(key.residual.rows(), 0);
  EXPECT_EQ(key.residual.cols(), 16);
  EXPECT_EQ(key.rotary.attention_factor, 1.5F);
  // A permutation: every coordinate once.
  EXPECT_TRUE(key.read * key.read.transpose() == MatrixD::Identity(16, 16));
  ASSERT_EQ(key.rotary.inv_freq.size(), 8U);
  for (std::size_t pair = 0; pair < 8; ++pair) {
    EXPECT_EQ(key.rotary.inv_freq[pair], sample.maps.rotary.inv_freq[pair % 4]);
    // Pair g d/2 + f is pair f of group g.
    const auto row = static_cast<Index>(pair);
    const Index column = row / 4 * 8 + row % 4;
    EXPECT_EQ(key.read(row, column), 1);
    EXPECT_EQ(key.read(row + 8, column + 4), 1);
  }
  // A query reaches its own group alone.
  for (Index h = 0; h < 6; ++h) {
    const MatrixD scores = key.query[static_cast<std::size_t>(h)].transpose() * key.read;
    MatrixD expected = MatrixD::Zero(8, 16);
    expected.middleCols(h / 3 * 8, 8).setIdentity();
    EXPECT_TRUE(scores == expected) << h;
  }
}

// The layer as the sizes have it.
LatentAttention saved(const LayerSample& sample, Index rotating, const Partition& partition,
                      LosslessSizes& sizes) {
  sizes = lossless_sizes(sample.maps, rotating, partition);
  std::vector<JointLatent> latents;
  LatentShape shape;
  shape.heads = sample.maps.heads;
  lay_out(partition, sizes.groups, shape);
  for (Index g = 0; g < partition.groups; ++g) {
    const Index first = partition.first_head(g, shape.heads);
    latents.push_back(lossless_latent(sample.maps, rotating, first,
                                      partition.first_head(g + 1, shape.heads) - first,
                                      sizes.groups[static_cast<std::size_t>(g)]));
  }
  return split_values(
      assemble(sample.maps, sample.moments, lossless_rotary_key(sample.maps, sizes.components), latents, {}),
      partition, shape);
}

// The last pairs of every head do not rotate.
LayerSample partly_rotating(std::uint32_t seed, const GqaSample& sample, Index rotating) {
  LayerSample out = layer_sample(seed, sample, 150);
  std::fill(out.attention.rotary.inv_freq.begin() + rotating, out.attention.rotary.inv_freq.end(), 0.0F);
  out.maps = maps_of(out.attention);
  return out;
}

void expect_saved(const LayerSample& sample, Index rotating, Index rope_dim, Index rank) {
  for (const Partition& partition : {Partition{1, 1}, Partition{1, 2}, Partition{2, 1}}) {
    SCOPED_TRACE(std::to_string(partition.groups) + " groups, " + std::to_string(partition.parts) + " parts");
    LosslessSizes sizes;
    const LatentAttention latent = saved(sample, rotating, partition, sizes);
    EXPECT_EQ(latent.rope_dim, rope_dim);
    if (partition.groups == 1) {
      EXPECT_EQ(latent.total_rank(), rank);
    }
    EXPECT_LE(relative_error(output_of(latent, sample.x), output_of(sample.attention, sample.x)),
              kFloatNoise);
  }
}

TEST(Lossless, WhatDoesNotRotateIsInTheLatent) {
  for (const float factor : {1.0F, 1.25F}) {
    const LayerSample sample =
        partly_rotating(4, {.hidden = 40, .q_bias = true, .kv_bias = true, .attention_factor = factor}, 3);
    // Nothing is redundant: 2 heads of 6 + (2 + 8) numbers.
    expect_saved(sample, 3, 12, 20);
  }
}

TEST(Lossless, LatentsHaveNoMoreNumbersThanTheInput) {
  // 4 heads of 8, half of them without rotation: 16 keys and 32 values of an input of 24.
  const LayerSample sample = partly_rotating(5, {.heads = 4, .kv_heads = 4}, 2);
  expect_saved(sample, 2, 16, 24);
}

TEST(Lossless, ValuesThatAreKeysAreCachedOnce) {
  LayerSample sample = partly_rotating(6, {.hidden = 40, .kv_bias = true}, 2);
  sample.attention.v = sample.attention.k;
  sample.maps = maps_of(sample.attention);
  expect_saved(sample, 2, 8, 16);  // half of the values come with the keys that do not rotate
}

TEST(Lossless, HeadsThatDependOnOthersCostNothing) {
  LayerSample sample = layer_sample(7, {.hidden = 40, .heads = 6, .kv_heads = 3}, 150);
  GqaAttention& a = sample.attention;
  a.v.weight.bottomRows(8) = a.v.weight.topRows(8);
  // Float32 sums are not exact, which float64 sees: so numbers of a few bits.
  const auto few_bits = [](MatrixF& m) { m = (m.array() * 64).round() / 64; };
  few_bits(a.k.weight);
  a.k.weight.middleRows(16, 8) = a.k.weight.topRows(8) - 2 * a.k.weight.middleRows(8, 8);
  sample.maps = maps_of(a);
  LosslessSizes sizes;
  const LatentAttention latent = saved(sample, 4, {1, 1}, sizes);
  EXPECT_EQ(sizes.components, (std::vector<Index>{2, 2, 2, 2}));
  EXPECT_EQ(latent.rope_dim, 16);
  EXPECT_EQ(latent.total_rank(), 16);
  EXPECT_LE(relative_error(output_of(latent, sample.x), output_of(a, sample.x)), kFloatNoise);
}

TEST(Lossless, LayersWithLessAreFilledUp) {
  LayerSample sample = partly_rotating(8, {.hidden = 40}, 2);
  sample.attention.v.weight.bottomRows(8) = sample.attention.v.weight.topRows(8);
  sample.attention.k.weight.bottomRows(8) = sample.attention.k.weight.topRows(8);
  sample.maps = maps_of(sample.attention);
  const LosslessSizes small = lossless_sizes(sample.maps, 2, {1, 1});
  EXPECT_EQ(small.rope_dim(), 4);
  EXPECT_EQ(small.groups.front().key_rank, 4);
  EXPECT_EQ(small.groups.front().rank, 12);
  const LosslessSizes all = larger_of(small, {{2, 1}, {{6, 13}}});
  EXPECT_EQ(all.components, (std::vector<Index>{2, 1}));
  EXPECT_EQ(all.groups.front().key_rank, 6);
  EXPECT_EQ(all.groups.front().rank, 14);
  const LatentAttention latent =
      assemble_mla(sample.maps, sample.moments, lossless_rotary_key(sample.maps, all.components),
                   lossless_latent(sample.maps, 2, 0, 6, all.groups.front()), {});
  EXPECT_EQ(latent.rope_dim, 6);
  EXPECT_EQ(latent.total_rank(), 14);
  EXPECT_EQ(latent.rotary.inv_freq, (std::vector<float>{1, sample.maps.rotary.inv_freq[1], 1}));
  EXPECT_LE(relative_error(output_of(latent, sample.x), output_of(sample.attention, sample.x)), kFloatNoise);
}

TEST(Lossless, LatentIsTheValues) {
  const LayerSample sample = layer_sample(3, {.kv_bias = true});
  const JointLatent latent = lossless_latent(sample.maps);
  EXPECT_TRUE(latent.value_up * latent.down == sample.maps.v);
  EXPECT_TRUE(latent.value_shift.isZero(0));
  EXPECT_EQ(latent.value_shift.size(), 16);
  EXPECT_EQ(latent.key_up.rows(), 0);
  EXPECT_EQ(latent.key_up.cols(), 16);
}

}  // namespace
}  // namespace relatent
