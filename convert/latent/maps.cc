#include "convert/latent/maps.h"

#include <Eigen/Dense>
#include <algorithm>
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
// Columns of a moment that one thread multiplies with.
constexpr Index slice_columns = 256;

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
  out.q = std::move(attention.q);
  out.k = map_of(attention.k);
  out.v = map_of(attention.v);
  out.o = std::move(attention.o.weight);
  out.o_bias = VectorD::Zero(out.o.rows());
  if (attention.o.bias.size() > 0) {
    out.o_bias = attention.o.bias.transpose().cast<double>();
  }
  out.scale = static_cast<double>(attention.scale);
  out.rotary = attention.rotary;
  return out;
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
  const Index hidden = layer.mean.size();
  Moments out;
  out.second.resize(hidden + 1, hidden + 1);
  out.second.topLeftCorner(hidden, hidden) = layer.second_moment;
  out.second.topRightCorner(hidden, 1) = layer.mean;
  out.second.bottomLeftCorner(1, hidden) = layer.mean.transpose();
  out.second(hidden, hidden) = 1;
  out.distance_mass = layer.distance_mass;
  return out;
}

Moments moments_without_data(const RmsNorm& input_norm, Index heads, Index length) {
  const Index hidden = input_norm.gain.size();
  Moments out;
  out.diagonal.resize(hidden + 1);
  out.diagonal << input_norm.gain.transpose().cast<double>().array().square(), 1;
  const VectorD mass = VectorD::LinSpaced(length, 1, static_cast<double>(length)).cwiseInverse();
  out.distance_mass = (mass / mass.sum()).transpose().replicate(heads, 1);
  return out;
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
