#include "convert/latent/transmla.h"

#include <Eigen/Dense>
#include <cmath>

#include "convert/compute/backend.h"
#include "formats/error.h"

namespace relatent {

void check_transmla(const TransmlaOptions& options, Index head_dim) {
  const auto text = [](Index n) { return std::to_string(n); };
  if (options.rope_dim <= 0 || options.rope_dim % 2 != 0 || head_dim % options.rope_dim != 0) {
    fail_usage("--rope-dim " + text(options.rope_dim) + " does not divide the head size " + text(head_dim) +
               " into whole pairs");
  }
  const Index collapse = head_dim / options.rope_dim;
  if (options.fold <= 0 || (head_dim / 2) % options.fold != 0 || options.fold % collapse != 0) {
    fail_usage("--fold " + text(options.fold) + " must be a multiple of head size / rotary size = " +
               text(collapse) + " and divide the " + text(head_dim / 2) + " frequencies of a head");
  }
}

Rotary transmla_rotary(const Rotary& source, const TransmlaOptions& options, Index head_dim) {
  Rotary out;
  out.attention_factor = source.attention_factor;
  for (Index f = 0; f < head_dim / 2; f += head_dim / options.rope_dim) {
    out.inv_freq.push_back(source.inv_freq[static_cast<std::size_t>(f)]);
  }
  return out;
}

TransmlaKey transmla_rotary_key(const LayerMaps& maps, const Moments& moments,
                                const TransmlaOptions& options) {
  check_transmla(options, maps.head_dim);
  const Index d = maps.head_dim;
  const Index half = maps.pairs();
  const Index p = options.rope_dim;
  const Index fold = options.fold;
  const Index collapse = d / p;
  const Index kept = fold / collapse;
  const MatrixD key_moment = second_moment(maps.k, moments);

  RotaryKey out;
  out.read = MatrixD::Zero(p, maps.key_dim());
  MatrixD leftover = MatrixD::Zero(maps.key_dim() - p, maps.key_dim());
  Index left = 0;
  out.rotary = transmla_rotary(maps.rotary, options, d);
  for (Index fold_idx = 0; fold_idx < half / fold; ++fold_idx) {
    // Coordinates of this fold, real parts: group by group, frequency by frequency.
    std::vector<Index> real;
    for (Index g = 0; g < maps.kv_heads; ++g) {
      for (Index f = 0; f < fold; ++f) {
        real.push_back(g * d + fold_idx * fold + f);
      }
    }
    const auto n = static_cast<Index>(real.size());
    MatrixD moment(n, n);
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j < n; ++j) {
        const Index a = real[static_cast<std::size_t>(i)];
        const Index b = real[static_cast<std::size_t>(j)];
        moment(i, j) = key_moment(a, b) + key_moment(a + half, b + half);
      }
    }
    const MatrixD basis = backend().symmetric_eigenpairs(moment).vectors;
    for (Index c = 0; c < kept; ++c) {
      const Index pair = fold_idx * kept + c;
      for (Index i = 0; i < n; ++i) {
        out.read(pair, real[static_cast<std::size_t>(i)]) = basis(i, c);
        out.read(pair + p / 2, real[static_cast<std::size_t>(i)] + half) = basis(i, c);
      }
    }
    for (Index c = kept; c < n; ++c) {
      for (const Index shift : {Index{0}, half}) {
        for (Index i = 0; i < n; ++i) {
          leftover(left, real[static_cast<std::size_t>(i)] + shift) = basis(i, c);
        }
        ++left;
      }
    }
  }
  out.residual = MatrixD::Identity(maps.key_dim(), maps.key_dim()) - out.read.transpose() * out.read;
  for (Index h = 0; h < maps.heads; ++h) {
    out.query.emplace_back(out.read.middleCols(maps.group_of(h) * d, d));
    out.content_query.emplace_back(MatrixD::Identity(d, d));
  }
  return {std::move(out), std::move(leftover)};
}

JointLatent transmla_latent(const LayerMaps& maps, const Moments& moments, const TransmlaKey& key,
                            const TransmlaOptions& options, Index rank) {
  const Index keys = maps.key_dim();
  const Index left = key.leftover.rows();
  MatrixD y(left + keys, maps.k.cols());
  y.topRows(left) = key.leftover * maps.k;
  y.bottomRows(keys) = maps.v;
  MatrixD moment = second_moment(y, moments);
  double ratio = 1;
  if (options.balance > 0 && left > 0) {
    const VectorD norms = moment.diagonal().cwiseMax(0).cwiseSqrt();
    const double value_norm = norms.tail(left).mean();
    const double key_norm = norms.head(left).mean();
    if (key_norm > 0 && value_norm > 0) {
      ratio = key_norm / (options.balance * value_norm);
    }
  }
  moment.topRows(left) /= ratio;
  moment.leftCols(left) /= ratio;
  y.topRows(left) /= ratio;
  const MatrixD basis = backend().symmetric_eigenpairs(moment, rank).vectors;
  return {basis.transpose() * y, key.leftover.transpose() * basis.topRows(left) * ratio,
          basis.bottomRows(keys), VectorD::Zero(keys)};
}

LowRankQuery transmla_query(const LayerMaps& maps, const Moments& moments, Index q_rank) {
  const MatrixD q = map_of(maps.q);
  const MatrixD basis = backend().symmetric_eigenpairs(second_moment(q, moments), q_rank).vectors;
  return {basis.transpose() * q, basis};
}

}  // namespace relatent
