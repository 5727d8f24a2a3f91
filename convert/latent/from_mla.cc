#include "convert/latent/from_mla.h"

#include <Eigen/Dense>
#include <algorithm>
#include <stdexcept>

#include "convert/compute/backend.h"

namespace relatent {
namespace {

// Directions of a metric below this part of its largest eigenvalue are raised to it.
constexpr double metric_floor = 1e-8;

const LatentBranch& only_branch(const LatentAttention& source) {
  if (source.branches.size() != 1 || !source.shared.empty()) {
    throw std::logic_error("from_mla: the source has more than one latent");
  }
  return source.branches.front();
}

VectorD gain_of(const LatentBranch& branch) {
  return branch.norm.present() ? VectorD(branch.norm.gain.transpose().cast<double>())
                               : VectorD(VectorD::Ones(branch.down.out()));
}

MatrixD symmetric(const MatrixD& m) {
  return 0.5 * (m + m.transpose());
}

// Divides a metric by the variance it sees, so that the two kinds of error compare.
MatrixD normalised(const MatrixD& metric, const MatrixD& covariance) {
  const double variance = metric.cwiseProduct(covariance).sum();
  return variance > 0 ? MatrixD(metric / variance) : MatrixD(MatrixD::Zero(metric.rows(), metric.cols()));
}

// Leading directions of a covariance under a metric: c = down ĉ, ĉ ≈ up c.
struct Directions {
  MatrixD down;  // [rank, r]
  MatrixD up;    // [r, rank]
};

Directions leading(const MatrixD& metric, const MatrixD& covariance, Index rank) {
  const SymmetricRoot root = backend().symmetric_root(metric, metric_floor);
  const Index found = std::min(rank, covariance.rows());
  const MatrixD basis =
      backend().symmetric_eigenpairs(symmetric(root.root * covariance * root.root), found).vectors;
  Directions out{MatrixD::Zero(rank, covariance.rows()), MatrixD::Zero(covariance.rows(), rank)};
  out.down.topRows(found) = basis.transpose() * root.root;
  out.up.leftCols(found) = root.inverse * basis;
  return out;
}

// The latents of a group's heads, from how their keys and outputs see ĉ.
Directions directions_of(const MatrixD& seen_by_keys, const MatrixD& values, const MatrixD& covariance,
                         const LatentGroup& group, const FromMlaOptions& options) {
  const MatrixD keys = options.key_weight * options.key_weight * seen_by_keys;
  if (options.partition.parts == 1) {
    return leading(keys + values, covariance, group.rank);
  }
  const Index r = covariance.rows();
  const Directions shared =
      leading(keys + options.value_weight * options.value_weight * values, covariance, group.shared);
  const MatrixD left = MatrixD::Identity(r, r) - shared.up * shared.down;
  const Directions rest = leading(values, second_moment(left, covariance), group.rank - group.shared);
  Directions out{MatrixD(group.rank, r), MatrixD(r, group.rank)};
  out.down << shared.down, rest.down * left;
  out.up << shared.up, rest.up;
  return out;
}

// What of ĉ a head's queries are compared with, part by part.
MatrixD latent_read_by(const LatentGroup& group, const LatentPart& part, const Directions& directions) {
  MatrixD out(directions.up.rows(), group.width(part));
  out << directions.up.leftCols(group.shared), directions.up.middleCols(part.first, part.rank);
  if (group.parts.size() > 1) {
    // The rest are the values' own; scores begin with what is shared.
    out.rightCols(part.rank).setZero();
  }
  return out;
}

}  // namespace

AbsorbedAttention from_mla(const LatentAttention& source, MomentRef input_moment,
                           const QueryMoments& query_moments, const HeadEffects& effects,
                           const FromMlaOptions& options) {
  const LatentBranch& branch = only_branch(source);
  const Index n = source.nope_dim;
  const Index p = source.rope_dim;
  const Index w = source.v_dim;
  const Index r = branch.down.out();
  const auto scale = static_cast<double>(source.scale);
  AbsorbedAttention out;
  out.nope_dim = n;
  out.scale = scale;
  out.softcap = source.softcap;
  out.rotary = source.rotary;
  out.o = source.o.weight.cast<double>();
  out.o_bias = source.o.bias.size() > 0 ? VectorD(source.o.bias.transpose().cast<double>())
                                        : VectorD(VectorD::Zero(source.o.out()));
  if (branch.norm.present()) {
    out.norm_rows = branch.down.weight;
    out.norm_eps = branch.norm.eps;
    if (branch.down.bias.size() > 0) {
      throw std::logic_error("from_mla: a normalised latent with a bias");
    }
  }
  const MatrixD latent = gain_of(branch).asDiagonal() * map_of(branch.down);
  const MatrixD covariance = second_moment(latent, input_moment);
  const MatrixD queries = map_of(source.q);
  const Index total = options.partition.groups * options.rank;
  out.key.resize(p + total, latent.cols());
  out.key.topRows(p) = map_of(source.rotary_key);
  for (Index g = 0; g < options.partition.groups; ++g) {
    LatentGroup group;
    group.first_head = options.partition.first_head(g, source.heads);
    group.head_count = options.partition.first_head(g + 1, source.heads) - group.first_head;
    group.first = g * options.rank;
    group.rank = options.rank;
    divide(options.partition.parts, options.key_rank, p, group);
    MatrixD keys = MatrixD::Zero(r, r);
    MatrixD values = MatrixD::Zero(r, r);
    for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
      const MatrixD up = branch.up.middleRows(h * (n + w), n + w).cast<double>();
      const MatrixD asked = queries.middleRows(h * (n + p), n);
      keys += effects.of_scores(h, scale) *
              (up.topRows(n).transpose() * (query_moments.of(h).after(asked) * asked.transpose()) *
               up.topRows(n));
      const MatrixD through = out.o.middleCols(h * w, w) * up.bottomRows(w);
      values += effects.of_values(h) * (through.transpose() * through);
    }
    keys = symmetric(keys);
    values = symmetric(values);
    if (!effects.known()) {
      keys = normalised(keys, covariance);
      values = normalised(values, covariance);
    }
    const Directions directions = directions_of(keys, values, covariance, group, options);
    out.key.middleRows(p + group.first, group.rank) = directions.down * latent;
    for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
      const MatrixD up = branch.up.middleRows(h * (n + w), n + w).cast<double>();
      const MatrixD content = scale * queries.middleRows(h * (n + p), n);
      MatrixD query = MatrixD::Zero(group.query_rows(), queries.cols());
      query.topRows(p) = scale * queries.middleRows(h * (n + p) + n, p);
      for (const LatentPart& part : group.parts) {
        const MatrixD read = latent_read_by(group, part, directions);
        query.middleRows(part.query, read.cols()) = (up.topRows(n) * read).transpose() * content;
      }
      out.query.push_back(std::move(query));
      out.value_up.emplace_back(up.bottomRows(w) * directions.up);
    }
    out.groups.push_back(std::move(group));
  }
  return out;
}

MatrixF mla_value_map(const LatentAttention& source) {
  const LatentBranch& branch = only_branch(source);
  const Index n = source.nope_dim;
  const Index w = source.v_dim;
  const Index r = branch.down.out();
  MatrixF out(source.o.out(), source.heads * r);
  for (Index h = 0; h < source.heads; ++h) {
    out.middleCols(h * r, r).noalias() =
        source.o.weight.middleCols(h * w, w) * branch.up.middleRows(h * (n + w) + n, w);
  }
  return out;
}

}  // namespace relatent
