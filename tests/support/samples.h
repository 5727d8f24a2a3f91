// Seeded random layers and inputs, and how far two results lie apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/products.h"
#include "convert/latent/maps.h"
#include "convert/model/attention.h"
#include "linalg/matrix.h"

namespace relatent::testing_support {

// A relative error between two float32 evaluations of one layer: sums of a few hundred terms, each rounded to
// 6e-8, of which the softmax magnifies those in the scores by a little.
inline constexpr double kFloatNoise = 1e-5;

// ‖found - expected‖ / ‖expected‖; infinite when the shapes differ or a value is not finite.
template <typename Found, typename Expected>
double relative_error(const Found& found, const Expected& expected) {
  if (found.rows() != expected.rows() || found.cols() != expected.cols()) {
    return INFINITY;
  }
  const MatrixD& wanted = expected.template cast<double>();  // of doubles it is the matrix itself
  const double difference = (found.template cast<double>() - wanted).norm();
  const double size = wanted.norm();
  const double error = size > 0 ? difference / size : difference;
  return std::isfinite(error) ? error : INFINITY;
}

// The same numbers with every standard library, unlike the distributions of <random>.
class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}
  // Uniform with zero mean and unit variance.
  double number() { return (static_cast<double>(engine_()) / 4294967295.0 * 2 - 1) * std::sqrt(3.0); }
  MatrixF matrix(Index rows, Index cols, double spread = 1) {
    MatrixF out(rows, cols);
    for (Index i = 0; i < out.size(); ++i) {
      out.data()[i] = static_cast<float>(spread * number());
    }
    return out;
  }
  MatrixD matrix_d(Index rows, Index cols) { return matrix(rows, cols).cast<double>(); }
  RowVectorF row(Index size, double spread = 1) { return matrix(1, size, spread).row(0); }
  // Keeps the variance of unit inputs; biases are as large as the outputs.
  Linear linear(Index out, Index in, bool bias) {
    Linear made{matrix(out, in, 1 / std::sqrt(static_cast<double>(in))), RowVectorF()};
    if (bias) {
      made.bias = row(out);
    }
    return made;
  }

 private:
  std::mt19937 engine_;
};

// A list without the geometric regularity of real ones, fastest first.
inline Rotary sample_rotary(Index size, float attention_factor = 1) {
  Rotary out;
  for (Index i = 0; i < size / 2; ++i) {
    out.inv_freq.push_back(1.0F / (1.0F + 0.7F * static_cast<float>(i * i)));
  }
  out.attention_factor = attention_factor;
  return out;
}

struct GqaSample {
  std::string name = "plain";
  Index hidden = 24;
  Index heads = 6;
  Index kv_heads = 2;
  Index head_dim = 8;
  bool q_bias = false;
  bool kv_bias = false;
  bool o_bias = false;
  float attention_factor = 1;
  std::optional<Index> window = {};
  float softcap = 0;
};

inline GqaAttention random_gqa(Random& random, const GqaSample& sample) {
  GqaAttention out;
  out.heads = sample.heads;
  out.kv_heads = sample.kv_heads;
  out.head_dim = sample.head_dim;
  out.window = sample.window;
  out.softcap = sample.softcap;
  out.scale = 1.0F / std::sqrt(static_cast<float>(sample.head_dim));
  out.q = random.linear(sample.heads * sample.head_dim, sample.hidden, sample.q_bias);
  out.k = random.linear(sample.kv_heads * sample.head_dim, sample.hidden, sample.kv_bias);
  out.v = random.linear(sample.kv_heads * sample.head_dim, sample.hidden, sample.kv_bias);
  out.o = random.linear(sample.hidden, sample.heads * sample.head_dim, sample.o_bias);
  out.rotary = sample_rotary(sample.head_dim, sample.attention_factor);
  return out;
}

inline std::vector<GqaSample> gqa_samples() {
  return {{},
          {.name = "all biases", .q_bias = true, .kv_bias = true, .o_bias = true},
          {.name = "scaled rotation", .kv_bias = true, .attention_factor = 1.25F},
          {.name = "one group", .heads = 3, .kv_heads = 1, .q_bias = true},
          {.name = "a group per head", .hidden = 20, .heads = 4, .kv_heads = 4, .head_dim = 6}};
}

// Inputs with a mean and unequal variances, as normed hidden states have them.
inline MatrixF sample_inputs(Random& random, Index length, Index hidden) {
  MatrixF x = random.matrix(length, hidden);
  const RowVectorF spread = random.row(hidden, 0.3).array() + 1.0F;
  const RowVectorF mean = random.row(hidden, 0.3);
  x.array().rowwise() *= spread.array();
  x.rowwise() += mean;
  return x;
}

// The attention's part of the residual stream.
inline MatrixF output_of(const Attention& attention, const MatrixF& x) {
  const RotaryTable table(rotary_of(attention), x.rows());
  return product(output_projection(attention), attention_forward(attention, x, table));
}

// [x; 1] as columns.
inline MatrixD with_ones(const MatrixF& x) {
  MatrixD out = MatrixD::Ones(x.cols() + 1, x.rows());
  out.topRows(x.cols()) = x.cast<double>().transpose();
  return out;
}

// The moments of these very inputs, with a distribution of distances that differs between heads.
inline Moments sample_moments(Random& random, const MatrixF& x, Index heads) {
  const MatrixD columns = with_ones(x);
  Moments out;
  out.second = columns * columns.transpose() / static_cast<double>(x.rows());
  out.distance_mass = random.matrix_d(heads, 11).array().square();
  for (Index h = 0; h < heads; ++h) {
    out.distance_mass.row(h) /= out.distance_mass.row(h).sum();
  }
  return out;
}

// A layer, inputs to it and their moments.
struct LayerSample {
  GqaAttention attention;
  MatrixF x;
  LayerMaps maps;
  Moments moments;
};

// Directions beyond `length` have no variance in the moments, so give more inputs than hidden numbers to have
// full rank.
inline LayerSample layer_sample(std::uint32_t seed, const GqaSample& sample = {}, Index length = 60) {
  Random random(seed);
  LayerSample out;
  out.attention = random_gqa(random, sample);
  out.x = sample_inputs(random, length, sample.hidden);
  out.maps = maps_of(out.attention);
  out.moments = sample_moments(random, out.x, sample.heads);
  return out;
}

}  // namespace relatent::testing_support
