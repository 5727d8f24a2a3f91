#include "convert/latent/rotary_key.h"

#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <vector>

#include "convert/latent/transmla.h"
#include "tests/support/reference.h"
#include "tests/support/samples.h"
#include "tests/support/trained_layer.h"

namespace relatent {
namespace {

using testing_support::gqa_samples;
using testing_support::GqaSample;
using testing_support::layer_sample;
using testing_support::LayerSample;
using testing_support::Random;
using testing_support::rotated;
using testing_support::trained_layer;
using testing_support::with_ones;

using Complex = std::complex<double>;

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

// Pair f of a head as one complex number.
Complex pair_of(const VectorD& head, Index f) {
  return {head(f), head(f + head.size() / 2)};
}

TEST(ExpectedRotation, OfOneDistanceIsItsRotation) {
  LayerSample sample = layer_sample(1);
  sample.moments.distance_mass.setZero();
  for (Index h = 0; h < 6; ++h) {
    sample.moments.distance_mass(h, h + 2) = 1;
  }
  const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
  [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
  ASSERT_EQ(gamma.rows(), 6);
  ASSERT_EQ(gamma.cols(), 4);
  for (Index h = 0; h < 6; ++h) {
    for (Index f = 0; f < 4; ++f) {
      const double angle = static_cast<double>(sample.maps.rotary.inv_freq[static_cast<std::size_t>(f)]) *
                           static_cast<double>(h + 2);
      EXPECT_NEAR(std::abs(gamma(h, f) - std::exp(Complex(0, -angle))), 0, 8 * kEpsilon);
    }
  }
}

TEST(ExpectedRotation, IsAMean) {
  const LayerSample sample = layer_sample(2);
  const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
  [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
  for (Index h = 0; h < 6; ++h) {
    for (Index f = 0; f < 4; ++f) {
      Complex expected = 0;
      for (Index delta = 0; delta < sample.moments.distance_mass.cols(); ++delta) {
        const double angle = static_cast<double>(sample.maps.rotary.inv_freq[static_cast<std::size_t>(f)]) *
                             static_cast<double>(delta);
        expected += sample.moments.distance_mass(h, delta) * Complex(std::cos(angle), -std::sin(angle));
      }
      EXPECT_NEAR(std::abs(gamma(h, f) - expected), 0, 32 * kEpsilon);
      EXPECT_LE(std::abs(gamma(h, f)), 1 + 32 * kEpsilon);
      EXPECT_LT(std::abs(gamma(h, 0)), 0.99);
    }
  }
}

// E_Δ|exp(-i θ_f Δ) - g|² under a head's own distances.
double loss_by_the_book(const LayerSample& sample, Index head, Index f, Complex stand_in) {
  double out = 0;
  for (Index delta = 0; delta < sample.moments.distance_mass.cols(); ++delta) {
    const double angle = static_cast<double>(sample.maps.rotary.inv_freq[static_cast<std::size_t>(f)]) *
                         static_cast<double>(delta);
    out += sample.moments.distance_mass(head, delta) * std::norm(std::exp(Complex(0, -angle)) - stand_in);
  }
  return out;
}

TEST(ExpectedRotation, LosesWhatNoConstantCanSay) {
  const LayerSample sample = layer_sample(12);
  const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
  for (Index h = 0; h < 6; ++h) {
    for (Index f = 0; f < 4; ++f) {
      const Complex gamma = dropped.stand_in(h, f);
      EXPECT_NEAR(dropped.loss(h, f), loss_by_the_book(sample, h, f, gamma), 32 * kEpsilon);
      for (const Complex other : {gamma + 0.01, gamma - 0.01, gamma + Complex(0, 0.01), Complex(1, 0)}) {
        EXPECT_GT(loss_by_the_book(sample, h, f, other), dropped.loss(h, f));
      }
    }
  }
}

TEST(UnitRotation, LosesTheWholeTurn) {
  LayerSample sample = layer_sample(13);
  const DroppedRotation dropped = unit_rotation(sample.maps, sample.moments);
  EXPECT_TRUE(dropped.stand_in == MatrixC::Ones(6, 4));
  ASSERT_EQ(dropped.loss.rows(), 6);
  ASSERT_EQ(dropped.loss.cols(), 4);
  const MatrixD least = expected_rotation(sample.maps, sample.moments).loss;
  for (Index h = 0; h < 6; ++h) {
    for (Index f = 0; f < 4; ++f) {
      EXPECT_NEAR(dropped.loss(h, f), loss_by_the_book(sample, h, f, 1), 64 * kEpsilon);
      EXPECT_GT(dropped.loss(h, f), least(h, f));
    }
  }
  // A head that looks at itself only loses nothing.
  sample.moments.distance_mass.row(2).setZero();
  sample.moments.distance_mass(2, 0) = 1;
  EXPECT_TRUE(unit_rotation(sample.maps, sample.moments).loss.row(2).isZero(0));
}

// Not rotating at all: the score is that of the plain query and key, times what the rotation scales by.
TEST(UnitRotation, ScoresWithoutPositions) {
  const LayerSample sample = layer_sample(14, {.attention_factor = 1.25F});
  const DroppedRotation dropped = unit_rotation(sample.maps, sample.moments);
  const RotaryKey key =
      rotary_key(sample.maps, concentrate(sample.maps, sample.moments, dropped), dropped, {0, 0, 0, 0});
  Random random(15);
  for (const MatrixD& content : key.content_query) {
    const VectorD q = random.matrix_d(8, 1);
    const VectorD k = random.matrix_d(8, 1);
    EXPECT_NEAR((content * q).dot(k), 1.25 * 1.25 * q.dot(k), 64 * kEpsilon);
  }
}

// Weights D² of the groups at one frequency, from the inputs themselves.
VectorD weights_by_the_book(const LayerSample& sample, const MatrixC& gamma, Index f) {
  const LayerMaps& maps = sample.maps;
  VectorD out = VectorD::Zero(maps.kv_heads);
  const MatrixD q = map_of(maps.q) * with_ones(sample.x);
  for (Index h = 0; h < maps.heads; ++h) {
    double energy = 0;
    for (Index n = 0; n < q.cols(); ++n) {
      energy += std::norm(pair_of(q.col(n).segment(h * maps.head_dim, maps.head_dim), f));
    }
    out(h * maps.kv_heads / maps.heads) +=
        energy / static_cast<double>(q.cols()) * (1 - std::norm(gamma(h, f)));
  }
  return out;
}

TEST(Concentrate, SeparatesTheKeysIntoUncorrelatedComponents) {
  for (const GqaSample& shape : gqa_samples()) {
    SCOPED_TRACE(shape.name);
    const LayerSample sample = layer_sample(3, shape);
    const LayerMaps& maps = sample.maps;
    const DroppedRotation dropped = expected_rotation(maps, sample.moments);
    [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
    const Concentration found = concentrate(maps, sample.moments, dropped);
    ASSERT_EQ(static_cast<Index>(found.loss.size()), maps.pairs());
    const MatrixD k = maps.k * with_ones(sample.x);
    for (Index f = 0; f < maps.pairs(); ++f) {
      const auto at = static_cast<std::size_t>(f);
      const Index groups = maps.kv_heads;
      EXPECT_LE((found.write[at] * found.read[at] - MatrixC::Identity(groups, groups)).norm(), 1e-12);
      // The components z = read k of the very keys: E[z zᴴ] is diagonal and holds the losses, largest first.
      MatrixC moment = MatrixC::Zero(groups, groups);
      VectorD key_energy = VectorD::Zero(groups);
      for (Index n = 0; n < k.cols(); ++n) {
        Eigen::VectorXcd keys(groups);
        for (Index g = 0; g < groups; ++g) {
          keys(g) = pair_of(k.col(n).segment(g * maps.head_dim, maps.head_dim), f);
          key_energy(g) += std::norm(keys(g)) / static_cast<double>(k.cols());
        }
        const Eigen::VectorXcd z = found.read[at] * keys;
        moment += z * z.adjoint() / static_cast<double>(k.cols());
      }
      const double squared_scale = maps.scale * maps.scale;
      const MatrixC expected = MatrixD((found.loss[at] / squared_scale).asDiagonal()).cast<Complex>();
      EXPECT_LE((moment - expected).norm(), 1e-12 * moment.norm());
      for (Index c = 1; c < groups; ++c) {
        EXPECT_LE(found.loss[at](c), found.loss[at](c - 1));
      }
      // All in all: the score variance that not rotating this frequency costs.
      const double total = weights_by_the_book(sample, gamma, f).dot(key_energy);
      EXPECT_NEAR(found.loss[at].sum() / (squared_scale * total), 1, 1e-12);
    }
  }
}

TEST(Concentrate, LosesNothingWhereRotationIsConstant) {
  LayerSample sample = layer_sample(4);
  sample.moments.distance_mass.setZero();
  sample.moments.distance_mass.col(3).setOnes();
  const Concentration found =
      concentrate(sample.maps, sample.moments, expected_rotation(sample.maps, sample.moments));
  for (std::size_t f = 0; f < 4; ++f) {
    EXPECT_LE(found.loss[f].norm(), 1e-12);
    EXPECT_LE((found.write[f] * found.read[f] - MatrixC::Identity(2, 2)).norm(), 1e-12);
  }
}

std::vector<Concentration> with_losses(const std::vector<std::vector<std::vector<double>>>& layers) {
  std::vector<Concentration> out;
  for (const auto& layer : layers) {
    out.emplace_back();
    for (const std::vector<double>& loss : layer) {
      out.back().loss.emplace_back(Eigen::Map<const VectorD>(loss.data(), static_cast<Index>(loss.size())));
    }
  }
  return out;
}

TEST(AllocateComponents, KeepsTheLargestLosses) {
  const auto layers = with_losses({{{9, 2}, {8, 7}, {1, 0}}});
  const std::vector<std::vector<Index>> expected = {{0, 0, 0}, {1, 0, 0}, {1, 1, 0}, {1, 2, 0},
                                                    {2, 2, 0}, {2, 2, 1}, {2, 2, 2}};
  for (std::size_t pairs = 0; pairs < expected.size(); ++pairs) {
    EXPECT_EQ(allocate_components(layers, static_cast<Index>(2 * pairs)), expected[pairs]) << pairs;
  }
  EXPECT_THROW(allocate_components(layers, 3), std::invalid_argument);
  EXPECT_THROW(allocate_components(layers, 14), std::invalid_argument);
}

TEST(AllocateComponents, SumsOverLayers) {
  // The first layer alone would keep frequency 0, the second frequency 1; together it is 2.
  const auto layers = with_losses({{{5, 0}, {0, 0}, {4, 0}}, {{0, 0}, {5, 0}, {4, 0}}});
  EXPECT_EQ(allocate_components(layers, 2), (std::vector<Index>{0, 0, 1}));
  EXPECT_EQ(allocate_components({layers[0]}, 2), (std::vector<Index>{1, 0, 0}));
  EXPECT_EQ(allocate_components({layers[1]}, 2), (std::vector<Index>{0, 1, 0}));
}

TEST(AllocateComponents, CountsUpToTheWholeKey) {
  const LayerSample sample = layer_sample(5);
  const Concentration found =
      concentrate(sample.maps, sample.moments, expected_rotation(sample.maps, sample.moments));
  for (Index p = 2; p <= 16; p += 2) {
    const std::vector<Index> components = allocate_components({found, found}, p);
    EXPECT_EQ(std::accumulate(components.begin(), components.end(), Index{0}), p / 2);
    for (const Index count : components) {
      EXPECT_LE(count, 2);
    }
  }
  EXPECT_EQ(allocate_components({found}, 16), (std::vector<Index>{2, 2, 2, 2}));
}

// All frequencies rotate.
PlainList plain_list(const std::vector<Concentration>& layers, Index rope_dim,
                     std::optional<Index> given = std::nullopt) {
  return allocate_plain(layers, rope_dim, static_cast<Index>(layers.front().loss.size()), given);
}

// Only the leading component of a frequency can be kept, so the second ones must not count.
TEST(AllocatePlain, TakesTheStrideThatKeepsMost) {
  const auto keeps = [](const std::vector<Concentration>& layers, Index rope_dim, Index stride,
                        const std::vector<Index>& components) {
    const PlainList found = plain_list(layers, rope_dim);
    EXPECT_EQ(found.stride, stride);
    EXPECT_EQ(found.components, components);
  };
  const auto slow = with_losses({{{1, 9}, {2, 1}, {3, 1}, {4, 9}, {5, 1}, {6, 0}}});
  keeps(slow, 4, 5, {1, 0, 0, 0, 0, 1});
  keeps(slow, 6, 2, {1, 0, 1, 0, 1, 0});
  keeps(slow, 8, 1, {1, 1, 1, 1, 0, 0});
  keeps(slow, 12, 1, {1, 1, 1, 1, 1, 1});
  const auto fast = with_losses({{{6, 0}, {5, 5}, {4, 4}, {3, 3}, {2, 2}, {1, 1}}});
  for (Index p = 4; p <= 12; p += 2) {
    EXPECT_EQ(plain_list(fast, p).stride, 1) << p;
  }
  // One pair is the fastest frequency, whatever the stride.
  keeps(slow, 2, 1, {1, 0, 0, 0, 0, 0});
  // Between strides that keep the same, the smallest.
  EXPECT_EQ(plain_list(with_losses({{{1}, {2}, {2}, {2}}}), 4).stride, 1);
  for (const Index p : {-2, 0, 3, 14}) {
    EXPECT_THROW(plain_list(slow, p), std::invalid_argument) << p;
  }
}

// Up to the last frequency whose first component beats what second components do; gaps before it count.
TEST(WorthwhileFrequencies, EndWhereTheFirstComponentIsWorthLessThanSecondOnes) {
  const auto layers =
      with_losses({{{9, 2}, {0, 0}, {5, 2}, {1, 1}, {1, 2}}, {{1, 1}, {0, 1}, {1, 1}, {1, 1}, {1, 1}}});
  EXPECT_EQ(worthwhile_frequencies(layers, 5), 3);
  EXPECT_EQ(worthwhile_frequencies(layers, 2), 1);
  // One head of keys has no second components: what rotates at all is worth its place.
  EXPECT_EQ(worthwhile_frequencies(with_losses({{{3}, {2}, {1}, {0}}}), 4), 3);
  // None is worth less than one pair.
  EXPECT_EQ(worthwhile_frequencies(with_losses({{{0, 0}, {0, 0}}}), 2), 1);
}

TEST(AllocatePlain, AGivenStrideIsTakenAsItIs) {
  const auto layers = with_losses({{{1, 9}, {2, 1}, {3, 1}, {4, 9}, {5, 1}, {6, 0}}});
  const auto keeps = [&](Index rope_dim, Index stride, const std::vector<Index>& components) {
    const PlainList found = plain_list(layers, rope_dim, stride);
    EXPECT_EQ(found.stride, stride);
    EXPECT_EQ(found.components, components);
  };
  keeps(4, 1, {1, 1, 0, 0, 0, 0});
  keeps(4, 2, {1, 0, 1, 0, 0, 0});
  keeps(4, 5, {1, 0, 0, 0, 0, 1});
  keeps(6, 1, {1, 1, 1, 0, 0, 0});
  keeps(2, 6, {1, 0, 0, 0, 0, 0});
  // Beyond the end of the list, or no list at all.
  EXPECT_THROW(plain_list(layers, 4, 6), std::invalid_argument);
  EXPECT_THROW(plain_list(layers, 6, 3), std::invalid_argument);
  EXPECT_THROW(plain_list(layers, 4, 0), std::invalid_argument);
  EXPECT_THROW(plain_list(layers, 4, -1), std::invalid_argument);
}

TEST(AllocatePlain, SumsOverLayers) {
  const auto layers = with_losses({{{1}, {5}, {4}, {0}}, {{1}, {0}, {4}, {5}}});
  EXPECT_EQ(plain_list({layers[0]}, 4).stride, 1);
  EXPECT_EQ(plain_list({layers[1]}, 4).stride, 3);
  EXPECT_EQ(plain_list(layers, 4).stride, 2);
  EXPECT_EQ(plain_list(layers, 4).components, (std::vector<Index>{1, 0, 1, 0}));
}

// What does not rotate comes behind, and is not in the list.
TEST(AllocatePlain, StaysAmongThoseThatRotate) {
  const auto layers = with_losses({{{1}, {2}, {1}, {3}, {0}, {0}}});
  EXPECT_EQ(allocate_plain(layers, 4, 4).stride, 3);
  EXPECT_EQ(allocate_plain(layers, 4, 3).stride, 1);
  EXPECT_EQ(allocate_plain(layers, 6, 4).components, (std::vector<Index>{1, 1, 1, 0, 0, 0}));
  EXPECT_THROW(allocate_plain(layers, 10, 4), std::invalid_argument);
}

TEST(RotaryKey, WithEveryComponentLeavesNothing) {
  for (const GqaSample& shape : gqa_samples()) {
    SCOPED_TRACE(shape.name);
    const LayerSample sample = layer_sample(6, shape);
    const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
    [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
    const RotaryKey key =
        rotary_key(sample.maps, concentrate(sample.maps, sample.moments, dropped), dropped,
                   std::vector<Index>(static_cast<std::size_t>(sample.maps.pairs()), shape.kv_heads));
    EXPECT_EQ(key.rope_dim(), sample.maps.key_dim());
    EXPECT_LE(key.residual.norm(), 1e-12);
    EXPECT_EQ(key.rotary.attention_factor, shape.attention_factor);
  }
}

// With nothing kept all is content, and where the distance is certain content is all that is needed.
TEST(RotaryKey, WithoutComponentsScoresAtTheExpectedDistance) {
  LayerSample sample = layer_sample(7, {.attention_factor = 1.25F});
  const Index distance = 4;
  sample.moments.distance_mass.setZero();
  sample.moments.distance_mass.col(distance).setOnes();
  const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
  [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
  const RotaryKey key =
      rotary_key(sample.maps, concentrate(sample.maps, sample.moments, dropped), dropped, {0, 0, 0, 0});
  EXPECT_EQ(key.rope_dim(), 0);
  EXPECT_TRUE(key.rotary.inv_freq.empty());
  EXPECT_TRUE(key.residual == MatrixD::Identity(16, 16));
  Random random(8);
  for (Index h = 0; h < 6; ++h) {
    const VectorD q = random.matrix_d(8, 1);
    const VectorD k = random.matrix_d(8, 1);
    const double expected =
        rotated(sample.maps.rotary, 9, q).dot(rotated(sample.maps.rotary, 9 - distance, k));
    const double found = (key.content_query[static_cast<std::size_t>(h)] * q).dot(k);
    // Positions turn by float32 angles.
    EXPECT_NEAR(found, expected, 1e-5) << h;
  }
}

// Kept components rotate, the others are turned by their expectation: the score of any query with any keys.
TEST(RotaryKey, ScoreIsRotatedPlusExpected) {
  for (const std::vector<Index>& components :
       {std::vector<Index>{2, 1, 0, 1}, std::vector<Index>{1, 1, 1, 1}, std::vector<Index>{0, 2, 2, 0}}) {
    const LayerSample sample = layer_sample(9, {.attention_factor = 1.25F});
    const LayerMaps& maps = sample.maps;
    const DroppedRotation dropped = expected_rotation(maps, sample.moments);
    [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
    const Concentration concentration = concentrate(maps, sample.moments, dropped);
    const RotaryKey key = rotary_key(maps, concentration, dropped, components);
    ASSERT_EQ(static_cast<Index>(key.rotary.inv_freq.size()), key.rope_dim() / 2);
    Random random(10);
    const VectorD k = random.matrix_d(16, 1);
    const Index m = 7;
    const Index n = 2;
    for (Index h = 0; h < maps.heads; ++h) {
      const VectorD q = random.matrix_d(8, 1);
      const Index g = maps.group_of(h);
      double expected = 0;
      for (Index f = 0; f < 4; ++f) {
        const auto at = static_cast<std::size_t>(f);
        Eigen::VectorXcd keys(2);
        keys << pair_of(k.head(8), f), pair_of(k.tail(8), f);
        const Eigen::VectorXcd kept = concentration.write[at].leftCols(components[at]) *
                                      (concentration.read[at].topRows(components[at]) * keys);
        const Complex turn =
            std::exp(Complex(0, -static_cast<double>(maps.rotary.inv_freq[at]) * static_cast<double>(m - n)));
        const Complex score = std::conj(pair_of(q, f)) * (kept(g) * turn + (keys(g) - kept(g)) * gamma(h, f));
        expected += 1.25 * 1.25 * score.real();
      }
      const auto head = static_cast<std::size_t>(h);
      const VectorD left = key.residual * k;
      const double found =
          rotated(key.rotary, m, key.query[head] * q).dot(rotated(key.rotary, n, key.read * k)) +
          (key.content_query[head] * q).dot(left.segment(g * 8, 8));
      EXPECT_NEAR(found, expected, 1e-5) << h;
    }
  }
}

// The second group's keys are the first's, each frequency turned by a phase of its own.
LayerSample phase_shifted() {
  LayerSample sample = layer_sample(11, {.kv_bias = true});
  for (Index f = 0; f < 4; ++f) {
    const double phase = 0.6 + 0.8 * static_cast<double>(f);
    const MatrixD re = sample.maps.k.row(f);
    const MatrixD im = sample.maps.k.row(f + 4);
    sample.maps.k.row(8 + f) = std::cos(phase) * re - std::sin(phase) * im;
    sample.maps.k.row(8 + f + 4) = std::sin(phase) * re + std::cos(phase) * im;
  }
  return sample;
}

double leftover_energy(const LayerSample& sample, const MatrixD& residual) {
  return second_moment(residual * sample.maps.k, sample.moments).trace() /
         second_moment(sample.maps.k, sample.moments).trace();
}

TEST(RotaryKey, AlignsPhasesThatARealMixCannot) {
  const LayerSample sample = phase_shifted();
  const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
  [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
  const Concentration found = concentrate(sample.maps, sample.moments, dropped);
  for (std::size_t f = 0; f < 4; ++f) {
    EXPECT_LE(found.loss[f](1), 1e-12 * found.loss[f](0)) << f;
  }
  const RotaryKey complex_key = rotary_key(sample.maps, found, dropped, {1, 1, 1, 1});
  EXPECT_LE(leftover_energy(sample, complex_key.residual), 1e-12);
  const RotaryKey real_key = transmla_rotary_key(sample.maps, sample.moments, {.rope_dim = 8}).key;
  EXPECT_EQ(real_key.rope_dim(), complex_key.rope_dim());
  EXPECT_GT(leftover_energy(sample, real_key.residual), 0.05);
}

// With equal weights the complex eigenvectors are the best there are, the real ones among them.
TEST(RotaryKey, KeepsMoreOfATrainedLayerThanARealMix) {
  const LayerSample sample = trained_layer(2);
  const LayerMaps& maps = sample.maps;
  const DroppedRotation dropped = expected_rotation(maps, sample.moments);
  [[maybe_unused]] const MatrixC& gamma = dropped.stand_in;
  const Concentration found = concentrate(maps, sample.moments, dropped);
  const auto weighed_leftover = [&](const MatrixD& residual) {
    const MatrixD moment = second_moment(residual * maps.k, sample.moments);
    double out = 0;
    for (Index f = 0; f < maps.pairs(); ++f) {
      VectorD energy(maps.kv_heads);
      for (Index g = 0; g < maps.kv_heads; ++g) {
        const Index i = g * maps.head_dim + f;
        energy(g) = moment(i, i) + moment(i + maps.pairs(), i + maps.pairs());
      }
      const MatrixD q = second_moment(map_of(maps.q), sample.moments);
      for (Index h = 0; h < maps.heads; ++h) {
        const Index i = h * maps.head_dim + f;
        out += (q(i, i) + q(i + maps.pairs(), i + maps.pairs())) * (1 - std::norm(gamma(h, f))) *
               energy(maps.group_of(h));
      }
    }
    return out * maps.scale * maps.scale;
  };
  const std::vector<Index> one_each(16, 1);
  const double left = weighed_leftover(rotary_key(maps, found, dropped, one_each).residual);
  double promised = 0;
  double total = 0;
  for (const VectorD& loss : found.loss) {
    promised += loss.tail(3).sum();
    total += loss.sum();
  }
  EXPECT_NEAR(left / promised, 1, 1e-6);
  EXPECT_LT(left, weighed_leftover(transmla_rotary_key(maps, sample.moments, {.rope_dim = 32}).key.residual));
  // Free choice of frequencies does better still.
  const double free_choice =
      weighed_leftover(rotary_key(maps, found, dropped, allocate_components({found}, 32)).residual);
  EXPECT_LT(free_choice, left);
  EXPECT_LT(left, total);
}

}  // namespace
}  // namespace relatent
