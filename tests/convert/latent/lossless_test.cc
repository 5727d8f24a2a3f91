#include "convert/latent/lossless.h"

#include <gtest/gtest.h>

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
  EXPECT_EQ(latent.total_rank(), keys);
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
