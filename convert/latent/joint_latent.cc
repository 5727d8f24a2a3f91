#include "convert/latent/joint_latent.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "convert/compute/backend.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

// Directions of a metric below this part of its largest eigenvalue are raised to it.
constexpr double metric_floor = 1e-8;

// What is left of the keys below this part of their own variance is rounding, and deserves no rank.
constexpr double rounding = 1e-20;

// A block-diagonal metric and its inverse, one d x d block for each group.
struct Metric {
  std::vector<MatrixD> root;
  std::vector<MatrixD> inverse;
};

using Blocks = std::vector<MatrixD>;

MatrixD from_left(const Blocks& blocks, const MatrixD& m) {
  MatrixD out(m.rows(), m.cols());
  Index row = 0;
  for (const MatrixD& block : blocks) {
    out.middleRows(row, block.rows()).noalias() = block * m.middleRows(row, block.rows());
    row += block.rows();
  }
  return out;
}

MatrixD from_right(const MatrixD& m, const Blocks& blocks) {
  MatrixD out(m.rows(), m.cols());
  Index column = 0;
  for (const MatrixD& block : blocks) {
    out.middleCols(column, block.rows()).noalias() = m.middleCols(column, block.rows()) * block;
    column += block.rows();
  }
  return out;
}

// blocks m blocks without the asymmetry of rounding.
MatrixD around(const Blocks& blocks, const MatrixD& m) {
  const MatrixD out = from_right(from_left(blocks, m), blocks);
  return 0.5 * (out + out.transpose());
}

// Multiplies a metric by weight or, where it is to be balanced, so that it gives variance weight² in all to
// what it measures; nothing is measured when the variance is rounding against that of `whole`, the
// undiminished map. covariance: of what it measures.
void weigh(Metric& metric, const Eigen::Ref<const MatrixD>& covariance, const MatrixD& whole, MomentRef input,
           double weight, bool balanced) {
  double variance = 0;
  double total = 0;
  Index row = 0;
  for (const MatrixD& root : metric.root) {
    const Index d = root.rows();
    variance += (root * covariance.block(row, row, d, d)).cwiseProduct(root).sum();
    total += (root * second_moment(whole.middleRows(row, d), input)).cwiseProduct(root).sum();
    row += d;
  }
  double factor = 0;
  if (variance > rounding * total) {
    factor = balanced ? weight / std::sqrt(variance) : weight;
  }
  for (MatrixD& block : metric.root) {
    block *= factor;
  }
  for (MatrixD& block : metric.inverse) {
    block *= factor > 0 ? 1 / factor : 0;
  }
}

// The rows of a latent's keys (or values), group after group, and the heads that read them.
struct HeadRange {
  Index first_head;
  Index head_count;
  Index first_key;
  Index keys;
};

// How the heads see the keys or the values of each group: block-diagonal with one d x d block per group.
Metric metric_of(const LayerMaps& maps, const Moments& moments, const RotaryKey& key, const HeadRange& range,
                 bool value, bool output_metric) {
  const Index d = maps.head_dim;
  Metric out;
  for (Index g = 0; g < range.keys; g += d) {
    MatrixD squared = MatrixD::Zero(d, d);
    for (Index h = range.first_head; h < range.first_head + range.head_count; ++h) {
      if (maps.group_of(h) * d - range.first_key != g) {
        continue;
      }
      if (!output_metric) {
        squared.setIdentity();
      } else if (value) {
        const MatrixD o = maps.output_of(h);
        squared += moments.effects.of_values(h) * (o.transpose() * o);
      } else if (key.nope_dim() > 0) {
        squared += moments.effects.of_scores(h, maps.scale) *
                   second_moment(key.content_query[static_cast<std::size_t>(h)] * maps.query_of(h),
                                 moments.queries().of(h));
      }
    }
    SymmetricRoot block = backend().symmetric_root(squared, metric_floor);
    out.root.push_back(std::move(block.root));
    out.inverse.push_back(std::move(block.inverse));
  }
  return out;
}

}  // namespace

JointLatent joint_latent(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                         const JointLatentOptions& options) {
  const Stage stage("latent");
  const Index d = maps.head_dim;
  const Index hidden = maps.k.cols() - 1;
  const Index first_head = options.first_head;
  const Index head_count = options.head_count > 0 ? options.head_count : maps.heads;
  const Index first_key = maps.group_of(first_head) * d;
  const Index keys = (maps.group_of(first_head + head_count - 1) + 1) * d - first_key;
  const bool split = options.key_rank && *options.key_rank < options.rank;
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
  // Keys are balanced against values by what of them the softmax does not forget, even where the latent has
  // to carry the rest.
  MatrixD felt_keys = covariance.topLeftCorner(keys, keys);
  if (moments.mean.size() > 0) {
    const VectorD constant = y.topLeftCorner(keys, hidden) * moments.mean;
    felt_keys -= constant * constant.transpose();
  }

  // M is block-diagonal with one d x d block per group and kind: keys, then values.
  const bool balanced = !options.output_metric || !moments.effects.known();
  Metric metric;
  for (const bool value : {false, true}) {
    Metric part = metric_of(maps, moments, key, {first_head, head_count, first_key, keys}, value,
                            options.output_metric);
    const double value_weight = split ? options.value_weight : 1;
    const double weight = value ? value_weight : options.key_weight;
    weigh(part, value ? covariance.bottomRightCorner(keys, keys) : felt_keys,
          (value ? maps.v : maps.k).middleRows(first_key, keys), moments.input(), weight, balanced);
    std::move(part.root.begin(), part.root.end(), std::back_inserter(metric.root));
    std::move(part.inverse.begin(), part.inverse.end(), std::back_inserter(metric.inverse));
  }
  JointLatent out;
  out.first_head = first_head;
  out.head_count = head_count;
  out.first_kv_head = first_key / d;
  out.value_shift = mean.tail(keys);
  out.key_rank = split ? options.key_rank : std::nullopt;
  const Index leading = split ? *options.key_rank : options.rank;
  const MatrixD basis = backend().symmetric_eigenpairs(around(metric.root, covariance), leading).vectors;
  const MatrixD up = from_left(metric.inverse, basis);
  const MatrixD down = from_left(metric.root, basis).transpose() * y;
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
  const auto groups = static_cast<std::ptrdiff_t>(keys / d);
  const Blocks root(metric.root.begin() + groups, metric.root.end());
  const Blocks inverse(metric.inverse.begin() + groups, metric.inverse.end());
  const Index found = std::min(own, keys);
  const MatrixD values =
      backend().symmetric_eigenpairs(around(root, second_moment(left, moments)), found).vectors;
  out.down.bottomRows(own).setZero();
  out.down.middleRows(leading, found) = from_left(root, values).transpose() * left;
  out.value_up.middleCols(leading, found) = from_left(inverse, values);
  return out;
}

}  // namespace relatent
