#include "convert/latent/joint_latent.h"

#include <Eigen/Dense>
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
  const Index keys = maps.key_dim();
  const Index hidden = maps.q.cols() - 1;
  MatrixD y(2 * keys, hidden + 1);
  y.topRows(keys) = key.residual * maps.k;
  y.bottomRows(keys) = maps.v;
  VectorD mean = VectorD::Zero(2 * keys);
  if (options.centred) {
    mean = y * moments.second.col(hidden);
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
    for (Index h = 0; h < maps.heads; ++h) {
      const Index g = maps.group_of(h) * d;
      if (!options.output_metric) {
        squared.block(g, g, d, d).setIdentity();
      } else if (value) {
        const auto o = maps.o.middleCols(h * d, d);
        squared.block(g, g, d, d) += o.transpose() * o;
      } else {
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
    normalise(whole, covariance.block(offset, offset, keys, keys),
              second_moment(value ? maps.v : maps.k, moments), value ? 1.0 : options.lambda);
    metric.block(offset, offset, keys, keys) = whole.root;
    inverse.block(offset, offset, keys, keys) = whole.inverse;
  }
  MatrixD weighed = metric * covariance * metric;
  weighed = (0.5 * (weighed + weighed.transpose())).eval();
  const MatrixD basis = symmetric_eigenpairs(weighed, options.rank).vectors;
  const MatrixD up = inverse * basis;
  return {basis.transpose() * metric * y, up.topRows(keys), up.bottomRows(keys), mean.tail(keys)};
}

}  // namespace relatent
