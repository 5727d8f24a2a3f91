#include "convert/latent/joint_latent.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "linalg/decompose.h"

namespace relatent {
namespace {

// Directions of a metric below this part of its largest eigenvalue are raised to it.
constexpr double metric_floor = 1e-8;

// What is left of the keys below this part of their own variance is rounding, and deserves no rank.
constexpr double rounding = 1e-20;

double variance_in(const MatrixD& metric, const MatrixD& covariance) {
  const MatrixD half = metric * covariance;
  return half.cwiseProduct(metric).sum();
}

// Scales a metric so that it gives variance weight² in all to what it measures; nothing is measured when the
// variance is rounding against that of `whole`.
void normalise(SymmetricRoot& metric, const MatrixD& covariance, const MatrixD& whole, double weight) {
  const double variance = variance_in(metric.root, covariance);
  if (!(variance > rounding * variance_in(metric.root, whole))) {
    metric.root.setZero();
    metric.inverse.setZero();
    return;
  }
  const double factor = weight / std::sqrt(variance);
  metric.root *= factor;
  metric.inverse /= factor;
}

}  // namespace

JointLatent joint_latent(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                         const JointLatentOptions& options) {
  const Index d = maps.head_dim;
  const Index hidden = maps.q.cols() - 1;
  const Index first_head = options.first_head;
  const Index head_count = options.head_count > 0 ? options.head_count : maps.heads;
  const Index first_key = maps.group_of(first_head) * d;
  const Index keys = (maps.group_of(first_head + head_count - 1) + 1) * d - first_key;
  const bool split = options.key_rank >= 0 && options.key_rank < options.rank;
  MatrixD y(2 * keys, hidden + 1);
  y.topRows(keys) = key.residual.rows() > 0 ? MatrixD(key.residual.middleRows(first_key, keys) * maps.k)
                                            : MatrixD::Zero(keys, hidden + 1);
  y.bottomRows(keys) = maps.v.middleRows(first_key, keys);
  VectorD mean = VectorD::Zero(2 * keys);
  if (options.centred) {
    mean = y * moments.input().last_column();
  }
  // Centred: y - mean is the same map with another last column.
  y.col(hidden) -= mean;
  const MatrixD covariance = second_moment(y, moments);

  // M is block-diagonal with one d x d block per group and kind.
  MatrixD metric = MatrixD::Zero(2 * keys, 2 * keys);
  MatrixD inverse = MatrixD::Zero(2 * keys, 2 * keys);
  for (const bool value : {false, true}) {
    const Index offset = value ? keys : 0;
    MatrixD squared = MatrixD::Zero(keys, keys);
    for (Index h = first_head; h < first_head + head_count; ++h) {
      const Index g = maps.group_of(h) * d - first_key;
      if (!options.output_metric) {
        squared.block(g, g, d, d).setIdentity();
      } else if (value) {
        const auto o = maps.o.middleCols(h * d, d);
        squared.block(g, g, d, d) += o.transpose() * o;
      } else if (key.nope_dim() > 0) {
        squared.block(g, g, d, d) +=
            second_moment(key.content_query[static_cast<std::size_t>(h)] * maps.query_of(h), moments);
      }
    }
    SymmetricRoot whole{MatrixD::Zero(keys, keys), MatrixD::Zero(keys, keys)};
    for (Index g = 0; g < keys; g += d) {
      const SymmetricRoot block = symmetric_root(squared.block(g, g, d, d), metric_floor);
      whole.root.block(g, g, d, d) = block.root;
      whole.inverse.block(g, g, d, d) = block.inverse;
    }
    const double weight = value ? (split ? options.value_weight : 1.0) : options.lambda;
    normalise(whole, covariance.block(offset, offset, keys, keys),
              second_moment((value ? maps.v : maps.k).middleRows(first_key, keys), moments), weight);
    metric.block(offset, offset, keys, keys) = whole.root;
    inverse.block(offset, offset, keys, keys) = whole.inverse;
  }
  MatrixD weighed = metric * covariance * metric;
  weighed = (0.5 * (weighed + weighed.transpose())).eval();
  JointLatent out;
  out.first_head = first_head;
  out.head_count = head_count;
  out.first_kv_head = first_key / d;
  out.value_shift = mean.tail(keys);
  out.key_rank = split ? options.key_rank : -1;
  const Index leading = split ? options.key_rank : options.rank;
  const Eigenpairs<MatrixD> pairs = symmetric_eigenpairs(weighed, leading);
  const MatrixD& basis = pairs.vectors;
  const MatrixD up = inverse * basis;
  const MatrixD down = basis.transpose() * metric * y;
  if (!split) {
    out.down = down;
    out.key_up = up.topRows(keys);
    out.value_up = up.bottomRows(keys);
    return out;
  }
  out.down = MatrixD(options.rank, hidden + 1);
  out.key_up = MatrixD::Zero(keys, options.rank);
  out.value_up = MatrixD::Zero(keys, options.rank);
  out.down.topRows(leading) = down;
  out.key_up.leftCols(leading) = up.topRows(keys);
  out.value_up.leftCols(leading) = up.bottomRows(keys);
  // What the first coordinates leave of the values.
  const Index own = options.rank - leading;
  const MatrixD left = y.bottomRows(keys) - up.bottomRows(keys) * down;
  const MatrixD root = metric.bottomRightCorner(keys, keys);
  MatrixD remaining = root * second_moment(left, moments) * root;
  remaining = (0.5 * (remaining + remaining.transpose())).eval();
  const Index found = std::min(own, keys);
  const MatrixD values = symmetric_eigenpairs(remaining, found).vectors;
  out.down.bottomRows(own).setZero();
  out.down.middleRows(leading, found) = values.transpose() * root * left;
  out.value_up.middleCols(leading, found) = inverse.bottomRightCorner(keys, keys) * values;
  return out;
}

}  // namespace relatent
