#include "convert/latent/maps.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "convert/compute/backend.h"
#include "linalg/layouts.h"
#include "linalg/moments.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Against directions that the inputs hardly ever take.
constexpr double fold_ridge = 1e-6;
constexpr double stand_in_ridge = 1e-6;
// Columns of a moment that one thread multiplies with.
constexpr Index slice_columns = 256;

// E[x̃ x̃ᵀ] of x̃ = [x; 1].
MatrixD with_constant(const MatrixD& second, const VectorD& mean) {
  const Index size = mean.size();
  MatrixD out(size + 1, size + 1);
  out.topLeftCorner(size, size) = second;
  out.topRightCorner(size, 1) = mean;
  out.bottomLeftCorner(1, size) = mean.transpose();
  out(size, size) = 1;
  return out;
}

// What each number of norm(y) is of y's to first order: gain / root of the expected mean square of what is
// normalised together. square: E[y²].
VectorD expected_gain(const RmsNorm& norm, const VectorD& square) {
  const Index size = norm.gain.size();
  VectorD out = VectorD::Ones(square.size());
  for (Index first = 0; size > 0 && first < square.size(); first += size) {
    const double mean = square.segment(first, size).mean() + static_cast<double>(norm.eps);
    out.segment(first, size) = norm.gain.transpose().cast<double>() / std::sqrt(mean);
  }
  return out;
}

// W of E|y - W x̃|² at its least. moment: E[x̃ x̃ᵀ], cross: E[y x̃ᵀ].
MatrixD nearest_maps(MomentRef moment, const MatrixD& cross) {
  if (cross.size() == 0) {
    throw std::logic_error("linear_stand_in: nothing is known of the normalised heads");
  }
  return backend().ridge_solve(moment.matrix(), cross.transpose(), stand_in_ridge).transpose();
}

VectorD falling_mass(Index length) {
  const VectorD mass = VectorD::LinSpaced(length, 1, static_cast<double>(length)).cwiseInverse();
  return mass / mass.sum();
}

}  // namespace

MatrixD map_of(const Linear& linear) {
  MatrixD out(linear.weight.rows(), linear.weight.cols() + 1);
  copy_tiled(linear.weight, out.leftCols(linear.weight.cols()));
  out.rightCols<1>().setZero();
  if (linear.bias.size() > 0) {
    out.rightCols<1>() = linear.bias.transpose().cast<double>();
  }
  return out;
}

Linear linear_of(const MatrixD& map) {
  Linear out;
  out.weight.resize(map.rows(), map.cols() - 1);
  copy_tiled(map.leftCols(map.cols() - 1), out.weight);
  if (!map.rightCols<1>().isZero(0)) {
    out.bias = map.rightCols<1>().transpose().cast<float>();
  }
  return out;
}

MatrixD LayerMaps::query_of(Index head) const {
  if (normed_heads) {
    return MatrixD::Identity(head_dim, head_dim + 1);
  }
  return map_of(q.rows(head * head_dim, head_dim));
}

MatrixD LayerMaps::output_of(Index head) const {
  MatrixD out(o.rows(), head_dim);
  copy_tiled(o.middleCols(head * head_dim, head_dim), out);
  return out;
}

LayerMaps maps_of(GqaAttention attention) {
  const Stage stage("widen");
  LayerMaps out;
  out.heads = attention.heads;
  out.kv_heads = attention.kv_heads;
  out.head_dim = attention.head_dim;
  if (attention.normed()) {
    out.normed_heads = normed_heads_of(attention);
    const Index keys = attention.kv_heads * attention.head_dim;
    out.k = MatrixD::Identity(keys, 2 * keys + 1);
    out.v = MatrixD::Zero(keys, 2 * keys + 1);
    out.v.middleCols(keys, keys).setIdentity();
  } else {
    out.q = std::move(attention.q);
    out.k = map_of(attention.k);
    out.v = map_of(attention.v);
  }
  out.o = std::move(attention.o.weight);
  out.o_bias = VectorD::Zero(out.o.rows());
  if (attention.o.bias.size() > 0) {
    out.o_bias = attention.o.bias.transpose().cast<double>();
  }
  out.scale = static_cast<double>(attention.scale);
  out.softcap = attention.softcap;
  out.rotary = attention.rotary;
  return out;
}

NormedHeads normed_heads_of(const GqaAttention& attention) {
  return {attention.q, attention.q_norm, attention.k, attention.k_norm, attention.v, attention.head_dim, 0};
}

double fold_biases(const Moments& moments, const MatrixD& spread, LayerMaps& maps) {
  const MatrixD second = moments.input().matrix();
  const Index hidden = second.rows() - 1;
  const VectorD mean = second.topRightCorner(hidden, 1);
  const VectorD w = backend().ridge_solve(second.topLeftCorner(hidden, hidden), mean, fold_ridge);
  if (maps.has_q_bias()) {
    maps.q.weight += maps.q.bias.transpose() * w.transpose().cast<float>();
    maps.q.bias.resize(0);
  }
  const double missed = std::max(0.0, 1 - 2 * mean.dot(w) + w.dot(second.topLeftCorner(hidden, hidden) * w));
  VectorD key_bias = maps.k.rightCols<1>();
  const Index half = maps.pairs();
  for (Index g = 0; g < maps.kv_heads; ++g) {
    for (Index f = 0; f < half; ++f) {
      const double felt = spread(g, f);
      const double kept = felt > 0 ? felt / (felt + missed) : 0;
      key_bias(g * maps.head_dim + f) *= kept;
      key_bias(g * maps.head_dim + f + half) *= kept;
    }
  }
  maps.k.leftCols(hidden) += key_bias * w.transpose();
  maps.k.rightCols<1>().setZero();
  if (maps.v.rows() > 0) {
    maps.v.leftCols(hidden) += VectorD(maps.v.rightCols<1>()) * w.transpose();
    maps.v.rightCols<1>().setZero();
  }
  return missed;
}

Moments moments_of(const LayerMoments& layer) {
  Moments out;
  out.second = with_constant(layer.received_moment, layer.received_mean);
  out.equal = with_constant(layer.second_moment, layer.mean);
  out.distance_mass = layer.distance_mass;
  out.effects = {layer.mass_square, layer.score_effect};
  if (layer.normed_heads) {
    const NormedHeadMoments& heads = *layer.normed_heads;
    const Index d = heads.query_moment.cols();
    const Index queries = heads.query_mean.size();
    const Index keys = heads.feature_mean.size() / 2;
    VectorD mean(queries + keys);
    mean << heads.query_mean, heads.feature_mean.head(keys);
    out.normed_cross.resize(heads.cross.rows(), heads.cross.cols() + 1);
    out.normed_cross << heads.cross, mean;
    out.normed_square.resize(queries + keys);
    for (Index first = 0; first < queries; first += d) {
      out.normed_square.segment(first, d) = heads.query_moment.middleRows(first, d).diagonal();
    }
    out.normed_square.tail(keys) = heads.feature_moment.diagonal().head(keys);
  }
  return out;
}

Moments with_equal_weights(Moments moments) {
  if (moments.equal.size() > 0) {
    moments.second = std::move(moments.equal);
    moments.equal = {};
  }
  return moments;
}

Moments normed_moments_of(const LayerMoments& layer) {
  const NormedHeadMoments& heads = *layer.normed_heads;
  Moments out;
  out.second = with_constant(heads.feature_moment, heads.feature_mean);
  out.distance_mass = layer.distance_mass;
  out.effects = {layer.mass_square, layer.score_effect};
  const Index d = heads.query_moment.cols();
  for (Index first = 0; first < heads.query_mean.size(); first += d) {
    out.query.push_back(
        with_constant(heads.query_moment.middleRows(first, d), heads.query_mean.segment(first, d)));
  }
  return out;
}

Moments moments_without_data(const RmsNorm& input_norm, Index heads, Index length) {
  const Index hidden = input_norm.gain.size();
  Moments out;
  out.diagonal.resize(hidden + 1);
  out.diagonal << input_norm.gain.transpose().cast<double>().array().square(), 1;
  out.distance_mass = falling_mass(length).transpose().replicate(heads, 1);
  return out;
}

Moments normed_moments_without_data(const RmsNorm& input_norm, const GqaAttention& attention, Index length) {
  const Index d = attention.head_dim;
  const Index keys = attention.kv_heads * d;
  const Moments input = moments_without_data(input_norm, attention.heads, length);
  MatrixD features(2 * keys, input_norm.gain.size() + 1);
  features << map_of(attention.k), map_of(attention.v);
  MatrixD second = second_moment(features, input);
  VectorD mean = features * input.input().last_column();
  VectorD gain = VectorD::Ones(2 * keys);
  gain.head(keys) = expected_gain(attention.k_norm, second.diagonal().head(keys));
  second = gain.asDiagonal() * second * gain.asDiagonal();
  Moments out;
  out.second = with_constant(second, gain.cwiseProduct(mean));
  out.distance_mass = input.distance_mass;
  const MatrixD q = map_of(attention.q);
  const VectorD query_gain = expected_gain(attention.q_norm, input.input().energies(q));
  for (Index h = 0; h < attention.heads; ++h) {
    const MatrixD head = query_gain.segment(h * d, d).asDiagonal() * q.middleRows(h * d, d);
    out.query.push_back(with_constant(second_moment(head, input), head * input.input().last_column()));
  }
  return out;
}

GqaAttention linear_stand_in(GqaAttention attention, const Moments& moments) {
  const Stage stage("linear stand-in");
  const Index queries = attention.heads * attention.head_dim;
  const Index known = std::min(queries, moments.normed_cross.rows());
  attention.q = linear_of(nearest_maps(moments.asking(), moments.normed_cross.topRows(known)));
  attention.k = linear_of(
      nearest_maps(moments.input(), moments.normed_cross.bottomRows(moments.normed_cross.rows() - known)));
  attention.q_norm = {};
  attention.k_norm = {};
  return attention;
}

double stand_in_error(const Moments& moments, Index keys) {
  const Stage stage("linear stand-in");
  const MatrixD cross = moments.normed_cross.bottomRows(keys);
  const MatrixD map = nearest_maps(moments.input(), cross);
  // E|k̂ - W x̃|² = E|k̂|² - 2 <W, E[k̂ x̃ᵀ]> + <W E[x̃ x̃ᵀ], W>
  const double square = moments.normed_square.tail(keys).sum();
  const double whole = square - cross.rightCols<1>().squaredNorm();
  const double left = square - 2 * map.cwiseProduct(cross).sum() + moments.input().energies(map).sum();
  return whole > 0 ? std::max(0.0, left) / whole : 0;
}

MatrixD MomentRef::after(const MatrixD& map) const {
  if (matrix_ == nullptr) {
    return map * diagonal_->asDiagonal();
  }
  MatrixD out(map.rows(), matrix_->cols());
  parallel_for(static_cast<std::size_t>((out.cols() + slice_columns - 1) / slice_columns),
               [&](std::size_t i) {
                 const Index first = static_cast<Index>(i) * slice_columns;
                 const Index count = std::min(slice_columns, out.cols() - first);
                 out.middleCols(first, count).noalias() = map * matrix_->middleCols(first, count);
               });
  return out;
}

VectorD MomentRef::energies(const MatrixD& map) const {
  return matrix_ != nullptr ? VectorD(after(map).cwiseProduct(map).rowwise().sum())
                            : VectorD(map.cwiseAbs2() * *diagonal_);
}

VectorD MomentRef::last_column() const {
  if (matrix_ != nullptr) {
    return matrix_->rightCols<1>();
  }
  VectorD out = VectorD::Zero(size());
  out(size() - 1) = (*diagonal_)(size() - 1);
  return out;
}

VectorD MomentRef::diagonal() const {
  return matrix_ != nullptr ? VectorD(matrix_->diagonal()) : *diagonal_;
}

MatrixD MomentRef::matrix() const {
  return matrix_ != nullptr ? *matrix_ : MatrixD(diagonal_->asDiagonal());
}

MatrixD second_moment(const MatrixD& map, MomentRef moment) {
  if (moment.is_diagonal()) {
    const MatrixD root = map * moment.diagonal().cwiseSqrt().asDiagonal();
    MatrixD out = MatrixD::Zero(map.rows(), map.rows());
    out.selfadjointView<Eigen::Lower>().rankUpdate(root);
    mirror_lower(out);
    return out;
  }
  const MatrixD half = moment.after(map);
  MatrixD out = half * map.transpose();
  // Rounding breaks the symmetry that everything downstream relies on.
  out = (0.5 * (out + out.transpose())).eval();
  return out;
}

}  // namespace relatent
