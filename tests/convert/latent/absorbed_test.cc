#include "convert/latent/absorbed.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "convert/forms/mla.h"
#include "linalg/decompose.h"
#include "tests/support/absorbed.h"
#include "tests/support/trained_layer.h"

namespace relatent {
namespace {

using testing_support::absorbed_layer;
using testing_support::concentrated_key;
using testing_support::gqa_samples;
using testing_support::GqaSample;
using testing_support::key_by_the_book;
using testing_support::kFloatNoise;
using testing_support::layer_sample;
using testing_support::LayerSample;
using testing_support::output_by_the_book;
using testing_support::output_of;
using testing_support::Random;
using testing_support::relative_error;
using testing_support::trained_layer;
using testing_support::with_ones;

// Ranks below, at and above the size of a head, up to the full one.
std::vector<Index> ranks_of(const LayerMaps& maps) {
  return {maps.head_dim - 1, maps.head_dim, maps.key_dim(), 2 * maps.key_dim()};
}

TEST(Absorb, IsTheAssembledLayer) {
  std::vector<LayerSample> samples = {trained_layer(1)};
  for (const GqaSample& shape : gqa_samples()) {
    samples.push_back(layer_sample(1, shape));
  }
  for (const LayerSample& sample : samples) {
    const MatrixD columns = with_ones(sample.x.topRows(40));
    const RotaryKey key = concentrated_key(sample, sample.maps.key_dim() / 4);
    for (const Index rank : ranks_of(sample.maps)) {
      SCOPED_TRACE(rank);
      const JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = rank});
      const LatentAttention expected = assemble_mla(sample.maps, sample.moments, key, latent, {});
      const AbsorbedAttention absorbed = absorb(sample.maps, key, latent);
      EXPECT_EQ(absorbed.heads(), sample.maps.heads);
      EXPECT_EQ(absorbed.rope_dim(), key.rope_dim());
      EXPECT_EQ(absorbed.rank(), rank);
      EXPECT_EQ(absorbed.width(), rank + key.rope_dim());
      EXPECT_EQ(absorbed.v_dim(), sample.maps.head_dim);
      EXPECT_EQ(absorbed.nope_dim, sample.maps.head_dim);
      EXPECT_TRUE(absorbed.latent() == latent.down);
      EXPECT_LE(
          relative_error(output_by_the_book(absorbed, columns), output_of(expected, sample.x.topRows(40))),
          kFloatNoise);

      const LatentAttention found = to_latent_attention(absorbed, sample.moments.second);
      EXPECT_EQ(found.heads, expected.heads);
      EXPECT_EQ(found.nope_dim, expected.nope_dim);
      EXPECT_EQ(found.rope_dim, expected.rope_dim);
      EXPECT_EQ(found.v_dim, expected.v_dim);
      EXPECT_EQ(found.scale, expected.scale);
      EXPECT_EQ(found.rotary.inv_freq, expected.rotary.inv_freq);
      EXPECT_EQ(found.rotary.attention_factor, expected.rotary.attention_factor);
      ASSERT_EQ(found.branches.size(), 1U);
      EXPECT_EQ(found.branches[0].first_head, 0);
      EXPECT_EQ(found.branches[0].head_count, expected.heads);
      EXPECT_EQ(found.q.out(), expected.q.out());
      EXPECT_EQ(found.branches[0].up.rows(), expected.branches[0].up.rows());
      EXPECT_NEAR(found.branches[0].mean_square / expected.branches[0].mean_square, 1, 1e-9);
      EXPECT_NEAR(found.q_mean_square / expected.q_mean_square, 1, 1e-12);
      EXPECT_LE(relative_error(output_of(found, sample.x), output_of(expected, sample.x)), kFloatNoise);
    }
  }
}

TEST(Absorb, BiasesRideAlong) {
  for (const bool bias : {false, true}) {
    SCOPED_TRACE(bias);
    const LayerSample sample = layer_sample(2, {.q_bias = bias, .kv_bias = bias, .o_bias = bias});
    const RotaryKey key = concentrated_key(sample, 3);
    const JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = 12, .centred = false});
    const AbsorbedAttention absorbed = absorb(sample.maps, key, latent);
    const LatentAttention layer = to_latent_attention(absorbed, sample.moments.second);
    EXPECT_EQ(layer.q.bias.size(), bias ? 6 * (8 + 6) : 0);
    EXPECT_EQ(layer.rotary_key.bias.size(), bias ? 6 : 0);
    EXPECT_EQ(layer.branches[0].down.bias.size(), bias ? 12 : 0);
    EXPECT_EQ(layer.o.bias.size(), bias ? 24 : 0);
    // One bias at a time: each is seen in the output, and in that of the written form alike.
    const auto expect_seen = [&](const AbsorbedAttention& changed) {
      const MatrixD columns = with_ones(sample.x);
      const MatrixD expected = output_by_the_book(changed, columns);
      EXPECT_GT(relative_error(expected, output_by_the_book(absorbed, columns)), 1e-3);
      EXPECT_LE(
          relative_error(output_of(to_latent_attention(changed, sample.moments.second), sample.x), expected),
          kFloatNoise);
    };
    AbsorbedAttention changed = absorbed;
    changed.query[4].rightCols<1>().array() += 0.5;
    limit_content_rank(changed, sample.moments.second);
    expect_seen(changed);
    changed = absorbed;
    changed.key.rightCols<1>().array() += 0.5;
    expect_seen(changed);
    changed = absorbed;
    changed.o_bias.array() += 0.5;
    expect_seen(changed);
  }
}

// The constants in values that the latent leaves out.
TEST(Absorb, ShiftOfValuesGoesIntoTheOutputBias) {
  const LayerSample sample = layer_sample(3, {.kv_bias = true});
  const RotaryKey key = concentrated_key(sample, 3);
  JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = 12});
  const MatrixD columns = with_ones(sample.x);
  const MatrixD before = output_by_the_book(absorb(sample.maps, key, latent), columns);
  const VectorD constant = VectorD::LinSpaced(16, -1, 2);
  latent.value_shift += constant;
  VectorD by_head(48);
  for (Index h = 0; h < 6; ++h) {
    by_head.segment(h * 8, 8) = constant.segment(h / 3 * 8, 8);
  }
  const MatrixD expected = before.rowwise() + (sample.maps.o * by_head).transpose();
  EXPECT_LE(relative_error(output_by_the_book(absorb(sample.maps, key, latent), columns), expected), 1e-12);
}

// A layer as a fit leaves it: queries of full rank and of no head's shape, a latent with a mean.
AbsorbedAttention shaken(const LayerSample& sample, Index pairs, Index rank, Random& random) {
  AbsorbedAttention out = absorbed_layer(sample, pairs, rank);
  for (MatrixD& query : out.query) {
    query += 0.1 * random.matrix_d(query.rows(), query.cols());
  }
  out.key += 0.1 * random.matrix_d(out.key.rows(), out.key.cols());
  return out;
}

// E‖S^½ (B - B') x̃‖² over these very inputs, S being the covariance of their latents.
double content_difference(const LayerSample& sample, const AbsorbedAttention& a, const MatrixD& content,
                          const MatrixD& other) {
  const MatrixD columns = with_ones(sample.x);
  const MatrixD latents = a.latent() * columns;
  const MatrixD centred = latents.colwise() - latents.rowwise().mean();
  // Score differences of every query with every key, both from the one list of inputs.
  const MatrixD scores = ((content - other) * columns).transpose() * centred;
  return scores.squaredNorm() / static_cast<double>(columns.cols() * columns.cols());
}

MatrixD content_of(const AbsorbedAttention& a, Index head) {
  return a.query[static_cast<std::size_t>(head)].bottomRows(a.rank());
}

TEST(LimitContentRank, LeavesWhatFitsAlone) {
  const LayerSample sample = layer_sample(4, {.q_bias = true, .kv_bias = true});
  for (const Index rank : {5, 8}) {
    Random random(5);
    const AbsorbedAttention before = shaken(sample, 3, rank, random);
    AbsorbedAttention after = before;
    limit_content_rank(after, sample.moments.second);
    for (std::size_t h = 0; h < 6; ++h) {
      EXPECT_TRUE(after.query[h] == before.query[h]);
    }
    EXPECT_LE(relative_error(output_of(to_latent_attention(before, sample.moments.second), sample.x),
                             output_by_the_book(before, with_ones(sample.x))),
              kFloatNoise);
  }
}

TEST(LimitContentRank, LosesTheLeastOfTheScores) {
  for (const bool bias : {false, true}) {
    const LayerSample sample = layer_sample(6, {.q_bias = bias, .kv_bias = bias});
    Random random(7);
    AbsorbedAttention before = shaken(sample, 3, 14, random);
    before.nope_dim = 5;
    AbsorbedAttention after = before;
    limit_content_rank(after, sample.moments.second);
    const MatrixD latents = before.latent() * with_ones(sample.x);
    const MatrixD centred = latents.colwise() - latents.rowwise().mean();
    const MatrixD covariance = centred * centred.transpose() / static_cast<double>(sample.x.rows());
    const MatrixD input_root = symmetric_root(sample.moments.second, 0).root;
    for (Index h = 0; h < 6; ++h) {
      const MatrixD content = content_of(before, h);
      const MatrixD kept = content_of(after, h);
      const auto at = static_cast<std::size_t>(h);
      EXPECT_TRUE(after.query[at].topRows(6) == before.query[at].topRows(6));
      const VectorD sizes = symmetric_eigenpairs(kept * kept.transpose()).values;
      EXPECT_GT(sizes(4), 1e-6 * sizes(0));
      EXPECT_LE(sizes(5), 1e-12 * sizes(0));
      const VectorD energies =
          symmetric_eigenpairs(input_root * content.transpose() * covariance * content * input_root).values;
      const double dropped = energies.segment(5, 9).sum();
      EXPECT_GT(dropped, 0.01 * energies.sum());
      EXPECT_NEAR(content_difference(sample, before, content, kept) / dropped, 1, 1e-9);
      // The plain nearest map of that rank is not as good.
      const MatrixD basis = symmetric_eigenpairs(content * content.transpose(), 5).vectors;
      EXPECT_GT(content_difference(sample, before, content, basis * (basis.transpose() * content)),
                1.01 * dropped);
    }
    // Writing a layer that fits changes nothing more, and writing one that does not limits it the same.
    const MatrixD expected = output_by_the_book(after, with_ones(sample.x));
    EXPECT_LE(
        relative_error(output_of(to_latent_attention(after, sample.moments.second), sample.x), expected),
        kFloatNoise);
    EXPECT_LE(
        relative_error(output_of(to_latent_attention(before, sample.moments.second), sample.x), expected),
        kFloatNoise);
    AbsorbedAttention again = after;
    limit_content_rank(again, sample.moments.second);
    for (Index h = 0; h < 6; ++h) {
      EXPECT_LE(relative_error(content_of(again, h), content_of(after, h)), 1e-9);
    }
  }
}

TEST(ToLatentAttention, LeavesRoomThatNobodyNeedsEmpty) {
  const LayerSample sample = layer_sample(8, {.q_bias = true});
  const AbsorbedAttention absorbed = absorbed_layer(sample, 3, 5);
  const LatentAttention layer = to_latent_attention(absorbed, sample.moments.second);
  for (Index h = 0; h < 6; ++h) {
    EXPECT_FALSE(layer.branches[0].up.middleRows(h * 16, 5).isZero(0));
    EXPECT_TRUE(layer.branches[0].up.middleRows(h * 16 + 5, 3).isZero(0));
    EXPECT_TRUE(layer.q.weight.middleRows(h * 14 + 5, 3).isZero(0));
    EXPECT_TRUE(layer.q.bias.segment(h * 14 + 5, 3).isZero(0));
  }
}

TEST(LatentShrink, IsTheReciprocalNorm) {
  const LayerSample sample = layer_sample(9, {.kv_bias = true});
  Random random(10);
  AbsorbedAttention absorbed = absorbed_layer(sample, 3, 7);
  MatrixF inputs(sample.x.rows(), 25);
  inputs << sample.x, VectorF::Ones(sample.x.rows());
  EXPECT_EQ(latent_shrink(absorbed, inputs).size(), 0);
  const MatrixD plain = absorbed.key;
  absorbed.norm = {random.matrix_d(3, 25), random.matrix_d(10, 1).cwiseAbs2()};
  const VectorF found = latent_shrink(absorbed, inputs);
  ASSERT_EQ(found.size(), sample.x.rows());
  for (Index n = 0; n < found.size(); ++n) {
    const VectorD x = inputs.row(n).transpose().cast<double>();
    const VectorD shrunk = key_by_the_book(absorbed, n, x).tail(7);
    EXPECT_NEAR(static_cast<double>(found(n)) * (plain * x).tail(7).norm() / shrunk.norm(), 1, kFloatNoise);
  }
}

// The extra coordinates only steady the norm; what is written divides by the same number.
TEST(ToLatentAttention, CarriesTheNormOfTheLatent) {
  for (const Index rank : {5, 12}) {
    const LayerSample sample = layer_sample(11, {.q_bias = true, .kv_bias = true});
    Random random(12);
    AbsorbedAttention absorbed = absorbed_layer(sample, 3, rank);
    const MatrixD columns = with_ones(sample.x);
    const MatrixD plain = output_by_the_book(absorbed, columns);
    absorbed.norm = {random.matrix_d(3, 25), random.matrix_d(rank + 3, 1).cwiseAbs2().array() + 0.1};
    const MatrixD expected = output_by_the_book(absorbed, columns);
    EXPECT_GT(relative_error(expected, plain), 0.1);
    const LatentAttention layer = to_latent_attention(absorbed, sample.moments.second);
    EXPECT_EQ(layer.total_rank(), rank + 3);
    EXPECT_TRUE(layer.branches[0].norm.gain == RowVectorF::Ones(rank + 3));
    EXPECT_LE(relative_error(output_of(layer, sample.x), expected), kFloatNoise);
  }
}

}  // namespace
}  // namespace relatent
