#include "convert/latent/absorbed.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "convert/compute/cpu/latent_norm.h"
#include "convert/latent/assemble.h"
#include "convert/latent/lay_out.h"
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
  const MatrixD expected = before.rowwise() + (sample.maps.o.cast<double>() * by_head).transpose();
  EXPECT_LE(relative_error(output_by_the_book(absorb(sample.maps, key, latent), columns), expected), 1e-12);
}

// A layer as a fit leaves it: queries of full rank and of no head's shape, a latent with a mean.
AbsorbedAttention shaken(AbsorbedAttention out, Random& random) {
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
    const AbsorbedAttention before = shaken(absorbed_layer(sample, 3, rank), random);
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
    AbsorbedAttention before = shaken(absorbed_layer(sample, 3, 14), random);
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
    EXPECT_GT(relative_error(plain, expected), 0.1);
    const LatentAttention layer = to_latent_attention(absorbed, sample.moments.second);
    EXPECT_EQ(layer.total_rank(), rank + 3);
    EXPECT_TRUE(layer.branches[0].norm.gain == RowVectorF::Ones(rank + 3));
    EXPECT_LE(relative_error(output_of(layer, sample.x), expected), kFloatNoise);
  }
}

// Latents of groups of heads, with what scores may read of them.
std::vector<JointLatent> latents_of(const LayerSample& sample, const RotaryKey& key,
                                    const Partition& partition, Index rank, Index key_rank) {
  std::vector<JointLatent> out;
  for (Index g = 0; g < partition.groups; ++g) {
    JointLatentOptions options{.rank = rank + g};
    if (partition.parts > 1) {
      options.key_rank = key_rank;
    }
    options.first_head = partition.first_head(g, sample.maps.heads);
    options.head_count = partition.first_head(g + 1, sample.maps.heads) - options.first_head;
    out.push_back(joint_latent(sample.maps, sample.moments, key, options));
  }
  return out;
}

struct PartedCase {
  Partition partition;
  Index rank;  // of the first group; each later one has one more
  Index key_rank;
};

std::vector<PartedCase> parted_cases() {
  return {{{2, 1}, 7, 0},  {{4, 1}, 5, 0}, {{1, 2}, 9, 3}, {{1, 2}, 8, 0},
          {{1, 4}, 14, 5}, {{2, 2}, 8, 3}, {{2, 2}, 7, 0}};
}

std::string name_of(const PartedCase& test) {
  return std::to_string(test.partition.groups) + " groups of " + std::to_string(test.partition.parts) + ", " +
         std::to_string(test.key_rank) + " shared";
}

TEST(AbsorbInParts, IsTheAssembledLayerSplit) {
  for (const GqaSample& shape : {GqaSample{}, GqaSample{.q_bias = true, .kv_bias = true, .o_bias = true},
                                 GqaSample{.heads = 6, .kv_heads = 3, .attention_factor = 1.25F}}) {
    const LayerSample sample = layer_sample(13, shape);
    const RotaryKey key = concentrated_key(sample, sample.maps.key_dim() / 4);
    for (const PartedCase& test : parted_cases()) {
      SCOPED_TRACE(name_of(test));
      const std::vector<JointLatent> latents =
          latents_of(sample, key, test.partition, test.rank, test.key_rank);
      std::vector<GroupSizes> sizes;
      sizes.reserve(latents.size());
      for (const JointLatent& latent : latents) {
        sizes.push_back({test.key_rank, latent.rank()});
      }
      LatentShape laid;
      laid.heads = 6;
      lay_out(test.partition, sizes, laid);
      const LatentAttention expected =
          split_values(assemble(sample.maps, sample.moments, key, latents, {}), test.partition, laid);
      const AbsorbedAttention absorbed = absorb(sample.maps, key, latents, test.partition.parts);
      const LatentAttention found = to_latent_attention(absorbed, sample.moments.second);
      ASSERT_EQ(found.branches.size(), expected.branches.size());
      ASSERT_EQ(found.shared.size(), expected.shared.size());
      EXPECT_EQ(found.total_rank(), laid.kv_lora_rank);
      for (std::size_t b = 0; b < found.branches.size(); ++b) {
        const LatentBranch& branch = found.branches[b];
        EXPECT_EQ(branch.first_head, expected.branches[b].first_head);
        EXPECT_EQ(branch.head_count, expected.branches[b].head_count);
        EXPECT_EQ(branch.shared, expected.branches[b].shared);
        EXPECT_EQ(branch.up.cols(), expected.branches[b].up.cols());
        EXPECT_TRUE(branch.down.weight == expected.branches[b].down.weight);
        EXPECT_NEAR(branch.mean_square / expected.branches[b].mean_square, 1, 1e-9);
      }
      EXPECT_LE(relative_error(output_of(found, sample.x), output_of(expected, sample.x)), kFloatNoise);
      EXPECT_LE(relative_error(output_of(found, sample.x), output_by_the_book(absorbed, with_ones(sample.x))),
                kFloatNoise);
    }
  }
}

// As a fit leaves it: every part asks for its own coordinates too.
AbsorbedAttention shaken_parts(const LayerSample& sample, const PartedCase& test, Random& random) {
  const RotaryKey key = concentrated_key(sample, 3);
  return shaken(absorb(sample.maps, key, latents_of(sample, key, test.partition, test.rank, test.key_rank),
                       test.partition.parts),
                random);
}

// Covariance of what a part's scores read.
MatrixD key_covariance(const LayerSample& sample, const AbsorbedAttention& a, const LatentGroup& group,
                       const LatentPart& part) {
  MatrixD latents(group.shared + part.rank, sample.x.rows());
  const MatrixD all = a.key.middleRows(a.rope_dim() + group.first, group.rank) * with_ones(sample.x);
  latents << all.topRows(group.shared), all.middleRows(part.first, part.rank);
  const MatrixD centred = latents.colwise() - latents.rowwise().mean();
  return centred * centred.transpose() / static_cast<double>(latents.cols());
}

TEST(AbsorbInParts, KeyLatentIsSharedAndOwn) {
  const LayerSample sample = layer_sample(14, {.kv_bias = true});
  Random random(15);
  const AbsorbedAttention a = shaken_parts(sample, {{2, 2}, 8, 3}, random);
  for (const LatentGroup& group : a.groups) {
    EXPECT_EQ(group.shared, 3);
    for (const LatentPart& part : group.parts) {
      const MatrixD latents = key_latent_of(a, group, part) * with_ones(sample.x);
      ASSERT_EQ(latents.rows(), 3 + part.rank);
      const MatrixD centred = latents.colwise() - latents.rowwise().mean();
      EXPECT_LE(relative_error(centred * centred.transpose() / static_cast<double>(latents.cols()),
                               key_covariance(sample, a, group, part)),
                1e-12);
    }
  }
}

// All parts of a head together, through one list of content coordinates.
TEST(LimitContentRank, OverPartsLosesTheLeastOfTheScores) {
  for (const PartedCase& test : {PartedCase{{1, 2}, 9, 3}, PartedCase{{1, 4}, 14, 5},
                                 PartedCase{{2, 2}, 8, 3}, PartedCase{{1, 2}, 8, 0}}) {
    SCOPED_TRACE(name_of(test));
    const LayerSample sample = layer_sample(16, {.q_bias = true, .kv_bias = true});
    Random random(17);
    AbsorbedAttention before = shaken_parts(sample, test, random);
    before.nope_dim = 5;
    AbsorbedAttention after = before;
    limit_content_rank(after, sample.moments.second);
    const MatrixD input_root = symmetric_root(sample.moments.second, 0).root;
    for (const LatentGroup& group : before.groups) {
      for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
        const MatrixD& was = before.query[static_cast<std::size_t>(h)];
        const MatrixD& is = after.query[static_cast<std::size_t>(h)];
        EXPECT_TRUE(is.topRows(6) == was.topRows(6));
        const MatrixD kept = is.bottomRows(is.rows() - 6);
        const VectorD sizes = symmetric_eigenpairs(kept * kept.transpose()).values;
        EXPECT_GT(sizes(4), 1e-6 * sizes(0));
        EXPECT_LE(sizes(5), 1e-12 * sizes(0));
        // E|S^½ B x̃|² of all parts is the sum of this matrix's eigenvalues.
        MatrixD energy = MatrixD::Zero(25, 25);
        double lost = 0;
        for (const LatentPart& part : group.parts) {
          const MatrixD covariance = key_covariance(sample, before, group, part);
          const MatrixD content = was.middleRows(part.query, covariance.rows());
          const MatrixD change = content - is.middleRows(part.query, covariance.rows());
          energy += input_root * content.transpose() * covariance * content * input_root;
          const MatrixD differences = change * with_ones(sample.x);
          lost += (differences.transpose() * covariance * differences).trace() /
                  static_cast<double>(sample.x.rows());
        }
        const VectorD energies = symmetric_eigenpairs(energy).values;
        const double dropped = energies.tail(20).sum();
        EXPECT_GT(dropped, 0.01 * energies.sum());
        EXPECT_NEAR(lost / dropped, 1, 1e-8);
      }
    }
    // What is written is that layer.
    const MatrixD expected = output_by_the_book(after, with_ones(sample.x));
    EXPECT_LE(
        relative_error(output_of(to_latent_attention(after, sample.moments.second), sample.x), expected),
        kFloatNoise);
    EXPECT_LE(
        relative_error(output_of(to_latent_attention(before, sample.moments.second), sample.x), expected),
        kFloatNoise);
  }
}

// Nothing to ask beyond the rotary key.
TEST(LimitContentRank, WithoutRoomForContentKeepsNone) {
  const LayerSample sample = layer_sample(18, {.kv_bias = true});
  Random random(19);
  AbsorbedAttention a = shaken_parts(sample, {{1, 2}, 9, 3}, random);
  a.nope_dim = 0;
  const LatentAttention direct = to_latent_attention(a, sample.moments.second);
  EXPECT_EQ(direct.q.out(), 6 * 6);
  limit_content_rank(a, sample.moments.second);
  for (const MatrixD& query : a.query) {
    EXPECT_FALSE(query.topRows(6).isZero(0));
    EXPECT_TRUE(query.bottomRows(query.rows() - 6).isZero(0));
  }
  const MatrixD expected = output_by_the_book(a, with_ones(sample.x));
  EXPECT_LE(relative_error(output_of(direct, sample.x), expected), kFloatNoise);
}

TEST(LatentShrink, IsThatOfTheReplicatedNorm) {
  const LayerSample sample = layer_sample(20, {.kv_bias = true});
  Random random(21);
  for (const PartedCase& test : {PartedCase{{1, 1}, 7, 0}, PartedCase{{2, 2}, 8, 3}}) {
    AbsorbedAttention a = shaken_parts(sample, test, random);
    const MatrixD columns = with_ones(sample.x);
    const MatrixD plain = output_by_the_book(a, columns);
    a.norm_rows = random.matrix(10, 24, 0.3);
    a.norm_eps = 0.01F;
    limit_content_rank(a, sample.moments.second);
    MatrixF inputs(sample.x.rows(), 25);
    inputs << sample.x, VectorF::Ones(sample.x.rows());
    const VectorF found = latent_shrink(a, inputs);
    ASSERT_EQ(found.size(), sample.x.rows());
    for (Index n = 0; n < found.size(); ++n) {
      const VectorD y = a.norm_rows.cast<double>() * sample.x.row(n).transpose().cast<double>();
      const double rho = std::sqrt(y.squaredNorm() / 10 + static_cast<double>(a.norm_eps));
      EXPECT_NEAR(static_cast<double>(found(n)) * rho, 1, kFloatNoise);
    }
    const MatrixD expected = output_by_the_book(a, columns);
    EXPECT_GT(relative_error(plain, expected), 0.1);
    EXPECT_LE(relative_error(output_of(to_latent_attention(a, sample.moments.second), sample.x), expected),
              kFloatNoise);
  }
}

}  // namespace
}  // namespace relatent
