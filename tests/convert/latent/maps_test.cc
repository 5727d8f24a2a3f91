#include "convert/latent/maps.h"

#include <gtest/gtest.h>

#include <limits>
#include <type_traits>
#include <utility>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/products.h"
#include "tests/support/samples.h"

namespace relatent {
namespace {

using testing_support::gqa_samples;
using testing_support::GqaSample;
using testing_support::Random;
using testing_support::relative_error;
using testing_support::with_ones;

constexpr double kFloatEpsilon = std::numeric_limits<float>::epsilon();
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

TEST(Maps, ActLikeTheLayersLinears) {
  for (const GqaSample& sample : gqa_samples()) {
    SCOPED_TRACE(sample.name);
    Random random(1);
    const GqaAttention attention = testing_support::random_gqa(random, sample);
    const LayerMaps maps = maps_of(attention);
    const MatrixF x = testing_support::sample_inputs(random, 12, sample.hidden);
    const MatrixD columns = with_ones(x);
    EXPECT_LE(relative_error(map_of(maps.q) * columns, product(attention.q, x).transpose()),
              16 * kFloatEpsilon);
    EXPECT_LE(relative_error(maps.k * columns, product(attention.k, x).transpose()), 16 * kFloatEpsilon);
    EXPECT_LE(relative_error(maps.v * columns, product(attention.v, x).transpose()), 16 * kFloatEpsilon);
    EXPECT_TRUE(maps.o == attention.o.weight);
    EXPECT_EQ(maps.has_q_bias(), sample.q_bias);
    ASSERT_EQ(maps.o_bias.size(), sample.hidden);
    if (sample.o_bias) {
      EXPECT_TRUE(maps.o_bias == attention.o.bias.transpose().cast<double>());
    } else {
      EXPECT_TRUE(maps.o_bias.isZero(0));
    }
    EXPECT_EQ(maps.heads, sample.heads);
    EXPECT_EQ(maps.kv_heads, sample.kv_heads);
    EXPECT_EQ(maps.head_dim, sample.head_dim);
    EXPECT_EQ(maps.pairs(), sample.head_dim / 2);
    EXPECT_EQ(maps.key_dim(), sample.kv_heads * sample.head_dim);
    EXPECT_EQ(maps.scale, static_cast<double>(attention.scale));
    EXPECT_EQ(maps.rotary.inv_freq, attention.rotary.inv_freq);
    EXPECT_EQ(maps.rotary.attention_factor, attention.rotary.attention_factor);
    for (Index h = 0; h < sample.heads; ++h) {
      EXPECT_EQ(maps.group_of(h), attention.group_of(h));
      EXPECT_TRUE(maps.query_of(h) == map_of(maps.q).middleRows(h * sample.head_dim, sample.head_dim));
      EXPECT_TRUE(maps.output_of(h) ==
                  attention.o.weight.middleCols(h * sample.head_dim, sample.head_dim).cast<double>());
    }
  }
}

// With norms on the heads, what is linear starts behind the norms.
TEST(Maps, OfNormalisedHeadsSelectThem) {
  Random random(4);
  const GqaSample sample = gqa_samples().front();
  GqaAttention attention = testing_support::random_gqa(random, sample);
  attention.q_norm = {random.row(sample.head_dim), 1e-6F};
  attention.k_norm = {random.row(sample.head_dim), 1e-6F};
  const LayerMaps maps = maps_of(attention);
  const MatrixF x = testing_support::sample_inputs(random, 12, sample.hidden);
  const MatrixD f = with_ones(key_features(attention, x));
  const GqaProjections heads = project_unrotated(attention, x);
  EXPECT_TRUE(maps.k * f == heads.k.cast<double>().transpose());
  EXPECT_TRUE(maps.v * f == heads.v.cast<double>().transpose());
  EXPECT_EQ(maps.query_inputs(), sample.head_dim);
  EXPECT_FALSE(maps.has_q_bias());
  for (Index h = 0; h < sample.heads; ++h) {
    const MatrixF query = heads.q.middleCols(h * sample.head_dim, sample.head_dim);
    EXPECT_TRUE(maps.query_of(h) * with_ones(query) == query.cast<double>().transpose());
  }
  ASSERT_TRUE(maps.normed_heads.has_value());
  EXPECT_TRUE(maps.normed_heads->k.weight == attention.k.weight);
}

// Nothing that the inputs tell of the normalised heads is left in what the stand-in misses.
TEST(LinearStandIn, IsTheNearestLinearMap) {
  Random random(5);
  const GqaSample sample = gqa_samples().front();
  GqaAttention attention = testing_support::random_gqa(random, sample);
  attention.q_norm = {random.row(sample.head_dim), 1e-6F};
  attention.k_norm = {random.row(sample.head_dim), 1e-6F};
  const MatrixF x = testing_support::sample_inputs(random, 400, sample.hidden);
  const GqaProjections heads = project_unrotated(attention, x);
  const MatrixD columns = with_ones(x);
  MatrixD wanted(heads.q.cols() + heads.k.cols(), x.rows());
  wanted << heads.q.cast<double>().transpose(), heads.k.cast<double>().transpose();
  Moments moments;
  moments.second = columns * columns.transpose() / 400;
  moments.normed_cross = wanted * columns.transpose() / 400;
  moments.normed_square = wanted.cwiseAbs2().rowwise().mean();
  const GqaAttention found = linear_stand_in(attention, moments);
  EXPECT_FALSE(found.normed());
  MatrixD map(wanted.rows(), columns.rows());
  map << map_of(found.q), map_of(found.k);
  const MatrixD missed = wanted - map * columns;
  EXPECT_LE((missed * columns.transpose() / 400).norm(), 1e-4 * moments.normed_cross.norm());
  const Index keys = heads.k.cols();
  MatrixD varying = wanted.bottomRows(keys);
  varying.colwise() -= VectorD(varying.rowwise().mean());
  const double error = missed.bottomRows(keys).squaredNorm() / varying.squaredNorm();
  EXPECT_GT(error, 0.01);
  EXPECT_NEAR(stand_in_error(moments, keys), error, 1e-3 * error);
}

TEST(Moments, OfACalibratedLayerCoverTheConstant) {
  Random random(2);
  const MatrixF x = testing_support::sample_inputs(random, 40, 5);
  LayerMoments layer;
  layer.tokens = 40;
  const MatrixD product = x.cast<double>().transpose() * x.cast<double>() / 40;
  // Not every BLAS rounds both halves alike; what is stored is symmetric.
  layer.second_moment = 0.5 * (product + product.transpose());
  layer.mean = x.cast<double>().colwise().mean().transpose();
  layer.received_moment = layer.second_moment * 1.5;
  layer.received_mean = layer.mean * 1.1;
  layer.distance_mass = random.matrix_d(3, 4);
  layer.mass_square = random.matrix_d(3, 1);
  layer.score_effect = random.matrix_d(3, 1);
  const Moments moments = moments_of(layer);
  const MatrixD columns = with_ones(x);
  EXPECT_LE(relative_error(moments.asking().matrix(), columns * columns.transpose() / 40), 16 * kEpsilon);
  EXPECT_TRUE(moments.second.topLeftCorner(5, 5) == layer.received_moment);
  EXPECT_TRUE(moments.second.col(5).head(5) == layer.received_mean);
  for (const MatrixD& second : {moments.second, moments.equal}) {
    EXPECT_EQ(second(5, 5), 1);
    EXPECT_TRUE(second == second.transpose());
  }
  EXPECT_TRUE(moments.distance_mass == layer.distance_mass);
  EXPECT_TRUE(moments.effects.mass_square == layer.mass_square);
  EXPECT_TRUE(moments.effects.score_effect == layer.score_effect);

  const Moments equal = with_equal_weights(moments);
  EXPECT_TRUE(equal.input().matrix() == moments.equal);
  EXPECT_TRUE(equal.asking().matrix() == moments.equal);
  EXPECT_TRUE(with_equal_weights(equal).second == equal.second);
}

TEST(Moments, WithoutDataAreThoseOfUncorrelatedInputs) {
  Random random(3);
  const RmsNorm norm{random.row(7), 1e-5F};
  const Moments moments = moments_without_data(norm, 3, 50);
  const MatrixD second = moments.input().matrix();
  ASSERT_EQ(second.rows(), 8);
  ASSERT_EQ(second.cols(), 8);
  for (Index i = 0; i < 8; ++i) {
    for (Index j = 0; j < 8; ++j) {
      const double gain = i < 7 ? static_cast<double>(norm.gain(i)) : 1;
      EXPECT_DOUBLE_EQ(second(i, j), i == j ? gain * gain : 0) << i << " " << j;
    }
  }
  ASSERT_EQ(moments.distance_mass.rows(), 3);
  ASSERT_EQ(moments.distance_mass.cols(), 50);
  for (Index h = 0; h < 3; ++h) {
    EXPECT_NEAR(moments.distance_mass.row(h).sum(), 1, 50 * kEpsilon);
    for (Index delta = 0; delta < 50; ++delta) {
      EXPECT_NEAR(moments.distance_mass(h, delta) * static_cast<double>(1 + delta),
                  moments.distance_mass(h, 0), 8 * kEpsilon);
    }
  }
}

TEST(Moments, SecondMomentOfAMapIsThatOfItsOutputs) {
  Random random(4);
  const MatrixF x = testing_support::sample_inputs(random, 30, 6);
  const Moments moments = testing_support::sample_moments(random, x, 2);
  const MatrixD map = random.matrix_d(4, 7);
  const MatrixD y = map * with_ones(x);
  const MatrixD found = second_moment(map, moments);
  EXPECT_LE(relative_error(found, y * y.transpose() / 30), 64 * kEpsilon);
  EXPECT_TRUE(found == found.transpose());
}

// Where one direction of the input never changes, a bias is a linear map of it, and nothing is missed.
TEST(Maps, BiasesFoldIntoWeights) {
  GqaSample sample;
  sample.q_bias = true;
  Random random(5);
  const GqaAttention attention = testing_support::random_gqa(random, sample);
  MatrixF x = testing_support::sample_inputs(random, 200, sample.hidden);
  for (const bool steady : {true, false}) {
    if (steady) {
      x.col(3).setConstant(2);
    } else {
      x.col(3) = random.matrix(200, 1);
    }
    const Moments moments = testing_support::sample_moments(random, x, sample.heads);
    LayerMaps maps = maps_of(attention);
    const double missed = fold_biases(moments, MatrixD::Ones(sample.kv_heads, sample.head_dim / 2), maps);
    EXPECT_EQ(maps.q.bias.size(), 0);
    EXPECT_TRUE(maps.k.rightCols<1>().isZero(0));
    EXPECT_TRUE(maps.v.rightCols<1>().isZero(0));
    MatrixD columns = with_ones(x);
    const MatrixD wanted = map_of(attention.q) * columns;
    const MatrixD found = map_of(maps.q) * columns;
    // What is reported is what the queries miss, in units of their bias.
    const double bias = map_of(attention.q).rightCols<1>().squaredNorm();
    const double error = (found - wanted).squaredNorm() / static_cast<double>(x.rows()) / bias;
    EXPECT_NEAR(missed, error, 1e-6);
    if (steady) {
      EXPECT_LE(missed, 1e-6);
    } else {
      EXPECT_GT(missed, 1e-3);
      EXPECT_LT(missed, 1);
    }
  }
}

// What scores feel of a key bias: what is dropped of it as far as it varies over distance, and what is kept
// as far as wᵀ x misses it.
TEST(Maps, KeyBiasesAreKeptAsFarAsScoresFeelThem) {
  GqaSample sample;
  sample.kv_bias = true;
  Random random(6);
  const GqaAttention attention = testing_support::random_gqa(random, sample);
  const MatrixF x = testing_support::sample_inputs(random, 200, sample.hidden);
  const Moments moments = testing_support::sample_moments(random, x, sample.heads);
  const LayerMaps before = maps_of(attention);
  ASSERT_FALSE(before.k.rightCols<1>().isZero(0));
  const Index half = sample.head_dim / 2;
  MatrixD spread(sample.kv_heads, half);
  for (Index g = 0; g < sample.kv_heads; ++g) {
    for (Index f = 0; f < half; ++f) {
      spread(g, f) = f == 0 ? 0 : std::pow(10.0, -static_cast<double>(f));
    }
  }
  LayerMaps maps = before;
  const double missed = fold_biases(moments, spread, maps);
  for (Index g = 0; g < sample.kv_heads; ++g) {
    for (Index f = 0; f < half; ++f) {
      const Index row = g * sample.head_dim + f;
      const double bias = before.k(row, sample.hidden);
      // E[(W' - W) x], of which wᵀ x is 1 - missed on average.
      const double added = (maps.k - before.k)
                               .row(row)
                               .head(sample.hidden)
                               .dot(moments.second.col(sample.hidden).head(sample.hidden));
      const double kept = added / (bias * (1 - missed));
      const auto loss = [&](double part) {
        return (1 - part) * (1 - part) * spread(g, f) + part * part * missed;
      };
      EXPECT_LE(loss(kept), loss(kept + 1e-3) + 1e-9) << g << " " << f;
      EXPECT_LE(loss(kept), loss(kept - 1e-3) + 1e-9) << g << " " << f;
      if (f == 0) {
        EXPECT_NEAR(kept, 0, 1e-9);
      }
    }
  }
}

TEST(MomentRef, ADiagonalGivesWhatItsMatrixGives) {
  std::srand(5);
  const MatrixD map = MatrixD::Random(9, 14);
  const VectorD diagonal = VectorD::Random(14).cwiseAbs();
  const MatrixD matrix = diagonal.asDiagonal();
  const MomentRef one(diagonal);
  const MomentRef other(matrix);
  EXPECT_EQ(one.size(), other.size());
  EXPECT_LE(relative_error(one.after(map), other.after(map)), 16 * kEpsilon);
  EXPECT_LE(relative_error(one.energies(map), other.energies(map)), 16 * kEpsilon);
  EXPECT_TRUE(one.last_column() == other.last_column());
  EXPECT_TRUE(one.diagonal() == other.diagonal());
  EXPECT_TRUE(one.matrix() == other.matrix());
  const MatrixD second = second_moment(map, one);
  EXPECT_LE(relative_error(second, second_moment(map, other)), 16 * kEpsilon);
  EXPECT_TRUE(second == second.transpose());
}

// It would be read after the temporary is gone.
TEST(MomentRef, NothingRefersToATemporary) {
  EXPECT_TRUE((std::is_constructible_v<MomentRef, const MatrixD&>));
  EXPECT_TRUE((std::is_constructible_v<MomentRef, VectorD&>));
  EXPECT_FALSE((std::is_constructible_v<MomentRef, MatrixD>));
  EXPECT_FALSE((std::is_constructible_v<MomentRef, const VectorD>));
  using Sum = decltype(std::declval<const MatrixD&>() + std::declval<const MatrixD&>());
  EXPECT_FALSE((std::is_constructible_v<MomentRef, Sum>));
  const auto refer = [](auto&& moments) -> decltype(std::forward<decltype(moments)>(moments).input()) {
    return moments.input();
  };
  EXPECT_TRUE((std::is_invocable_v<decltype(refer), const Moments&>));
  EXPECT_FALSE((std::is_invocable_v<decltype(refer), Moments>));
}

}  // namespace
}  // namespace relatent
