#include "convert/latent/assemble.h"

#include <gtest/gtest.h>

#include "convert/latent/joint_latent.h"
#include "convert/latent/lossless.h"
#include "convert/latent/rotary_key.h"
#include "convert/latent/transmla.h"
#include "tests/support/reference.h"
#include "tests/support/samples.h"

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
using testing_support::with_ones;

// Pieces of sizes that no method makes, so that none can be taken for another.
struct Pieces {
  RotaryKey key;
  JointLatent latent;
  LowRankQuery query;
};

Pieces random_pieces(Random& random, const LayerMaps& maps, Index content) {
  const Index p = 4;
  const Index rank = 5;
  const Index q_rank = 7;
  Pieces out;
  out.key.read = random.matrix_d(p, maps.key_dim());
  for (Index h = 0; h < maps.heads; ++h) {
    out.key.query.push_back(random.matrix_d(p, maps.head_dim));
    out.key.content_query.push_back(random.matrix_d(content, maps.head_dim));
  }
  out.key.residual = random.matrix_d(content > 0 ? maps.key_dim() : 0, maps.key_dim());
  out.key.rotary = testing_support::sample_rotary(p, 1.25F);
  out.latent.down = random.matrix_d(rank, maps.k.cols());
  out.latent.key_up = random.matrix_d(content > 0 ? maps.key_dim() : 0, rank);
  out.latent.value_up = random.matrix_d(maps.key_dim(), rank);
  out.latent.value_shift = random.matrix_d(maps.key_dim(), 1);
  out.query = {random.matrix_d(q_rank, maps.k.cols()), random.matrix_d(maps.heads * maps.head_dim, q_rank)};
  return out;
}

// Every piece where its definition says, in double precision.
MatrixD output_by_definition(const LayerSample& sample, const Pieces& pieces, bool low_rank) {
  const LayerMaps& maps = sample.maps;
  const Index d = maps.head_dim;
  const Index content = pieces.key.nope_dim();
  const MatrixD columns = with_ones(sample.x);
  const MatrixD q = low_rank ? MatrixD(pieces.query.lift * (pieces.query.down * columns))
                             : MatrixD(map_of(maps.q) * columns);
  const MatrixD rotary_key = pieces.key.read * (maps.k * columns);
  const MatrixD c = pieces.latent.down * columns;
  const MatrixD r = pieces.latent.key_up * c;
  const MatrixD v = (pieces.latent.value_up * c).colwise() + pieces.latent.value_shift;
  MatrixD mixed(sample.x.rows(), maps.heads * d);
  for (Index h = 0; h < maps.heads; ++h) {
    const auto at = static_cast<std::size_t>(h);
    const Index g = maps.group_of(h) * d;
    mixed.middleCols(h * d, d) = testing_support::attend_by_the_book(
        sample.x.rows(), 0,
        [&](Index m, Index n) {
          const VectorD query = q.col(m).segment(h * d, d);
          double score = testing_support::rotated(pieces.key.rotary, m, pieces.key.query[at] * query)
                             .dot(testing_support::rotated(pieces.key.rotary, n, rotary_key.col(n)));
          if (content > 0) {
            score += (pieces.key.content_query[at] * query).dot(r.col(n).segment(g, d));
          }
          return maps.scale * score;
        },
        [&](Index n) -> VectorD { return v.col(n).segment(g, d); });
  }
  MatrixD out = mixed * maps.o.cast<double>().transpose();
  out.rowwise() += maps.o_bias.transpose();
  return out;
}

TEST(AssembleMla, PutsEveryPieceInItsPlace) {
  for (const GqaSample& shape : gqa_samples()) {
    for (const bool with_content : {false, true}) {
      for (const bool low_rank : {false, true}) {
        SCOPED_TRACE(shape.name + (with_content ? " content" : "") + (low_rank ? " low rank" : ""));
        const LayerSample sample = layer_sample(1, shape, 30);
        Random random(2);
        Pieces pieces = random_pieces(random, sample.maps, with_content ? shape.head_dim : 0);
        const LatentAttention layer = assemble_mla(sample.maps, sample.moments, pieces.key, pieces.latent,
                                                   low_rank ? std::optional(pieces.query) : std::nullopt);
        EXPECT_EQ(layer.heads, shape.heads);
        EXPECT_EQ(layer.nope_dim, with_content ? shape.head_dim : 0);
        EXPECT_EQ(layer.rope_dim, 4);
        EXPECT_EQ(layer.v_dim, shape.head_dim);
        EXPECT_EQ(layer.total_rank(), 5);
        ASSERT_EQ(layer.branches.size(), 1U);
        EXPECT_EQ(layer.branches[0].first_head, 0);
        EXPECT_EQ(layer.branches[0].head_count, shape.heads);
        EXPECT_FALSE(layer.branches[0].norm.present());
        EXPECT_EQ(layer.q_down.out(), low_rank ? 7 : 0);
        EXPECT_EQ(layer.rotary.attention_factor, 1.25F);
        // Random pieces make scores of a few tens, which multiply their own roundings.
        EXPECT_LE(relative_error(output_of(layer, sample.x), output_by_definition(sample, pieces, low_rank)),
                  30 * kFloatNoise);
      }
    }
  }
}

TEST(AssembleMla, KnowsTheSizeOfItsLatents) {
  const LayerSample sample = layer_sample(3, {.q_bias = true, .kv_bias = true});
  Random random(4);
  const Pieces pieces = random_pieces(random, sample.maps, 8);
  const auto mean_square = [](const MatrixD& m) { return m.squaredNorm() / static_cast<double>(m.size()); };
  const MatrixD columns = with_ones(sample.x);
  const LatentAttention direct = assemble_mla(sample.maps, sample.moments, pieces.key, pieces.latent, {});
  EXPECT_NEAR(direct.branches[0].mean_square / mean_square(pieces.latent.down * columns), 1, 1e-12);
  EXPECT_NEAR(direct.q_mean_square / mean_square(sample.x.cast<double>()), 1, 1e-12);
  const LatentAttention low_rank =
      assemble_mla(sample.maps, sample.moments, pieces.key, pieces.latent, pieces.query);
  EXPECT_NEAR(low_rank.q_mean_square / mean_square(pieces.query.down * columns), 1, 1e-12);
}

TEST(AssembleMla, BiasOnlyWhereThereIsOne) {
  for (const bool bias : {false, true}) {
    const LayerSample sample = layer_sample(5, {.q_bias = bias, .kv_bias = bias, .o_bias = bias});
    const LatentAttention layer = assemble_mla(sample.maps, sample.moments, lossless_rotary_key(sample.maps),
                                               lossless_latent(sample.maps), {});
    EXPECT_EQ(layer.q.bias.size(), bias ? 96 : 0);
    EXPECT_EQ(layer.rotary_key.bias.size(), bias ? 16 : 0);
    EXPECT_EQ(layer.branches[0].down.bias.size(), bias ? 16 : 0);
    EXPECT_EQ(layer.o.bias.size(), bias ? 24 : 0);
  }
}

// Concentration, leftover and query each exact: whatever is combined, the source comes back.
TEST(AssembleMla, ExactPiecesReturnTheSource) {
  for (const GqaSample& shape : gqa_samples()) {
    SCOPED_TRACE(shape.name);
    const LayerSample sample = layer_sample(6, shape);
    const Index keys = sample.maps.key_dim();
    const MatrixF expected = output_of(sample.attention, sample.x);
    const LowRankQuery query = transmla_query(sample.maps, sample.moments, shape.heads * shape.head_dim);
    const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
    [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
    const std::vector<Index> all(static_cast<std::size_t>(sample.maps.pairs()), shape.kv_heads);
    const RotaryKey key =
        rotary_key(sample.maps, concentrate(sample.maps, sample.moments, dropped), dropped, all);
    const JointLatent latent = joint_latent(sample.maps, sample.moments, key, {.rank = 2 * keys});
    for (const std::optional<LowRankQuery>& q : {std::optional<LowRankQuery>(), std::optional(query)}) {
      EXPECT_LE(relative_error(output_of(assemble_mla(sample.maps, sample.moments, key, latent, q), sample.x),
                               expected),
                kFloatNoise);
      EXPECT_LE(
          relative_error(output_of(assemble_mla(sample.maps, sample.moments, lossless_rotary_key(sample.maps),
                                                lossless_latent(sample.maps), q),
                                   sample.x),
                         expected),
          kFloatNoise);
    }
  }
}

}  // namespace
}  // namespace relatent
