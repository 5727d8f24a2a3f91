#include "convert/latent/published_slices.h"

#include <Eigen/Dense>
#include <cmath>
#include <numbers>
#include <stdexcept>
#include <vector>

#include "convert/compute/backend.h"
#include "convert/latent/maps.h"
#include "convert/latent/partition.h"

namespace relatent {
namespace {

MatrixD columns_of(const MatrixD& m, const std::vector<Index>& which) {
  MatrixD out(m.rows(), static_cast<Index>(which.size()));
  for (std::size_t i = 0; i < which.size(); ++i) {
    out.col(static_cast<Index>(i)) = m.col(which[i]);
  }
  return out;
}

// The coordinates of one slice: runs of equal length, or of principal components every so many-th.
std::vector<Index> coordinates_of(Index slice, Index parts, Index rank, LatentOrder order) {
  std::vector<Index> out;
  for (Index i = 0; i < rank; ++i) {
    const bool mine = order == LatentOrder::pca
                          ? i % parts == slice
                          : i >= cut_at(slice, parts, rank) && i < cut_at(slice + 1, parts, rank);
    if (mine) {
      out.push_back(i);
    }
  }
  return out;
}

// What the scores of a slice are multiplied by to be nearest to the whole ones.
double score_factor(const MatrixD& metric, const MatrixD& spread, const std::vector<Index>& which) {
  const MatrixD metric_columns = columns_of(metric, which);
  const MatrixD spread_columns = columns_of(spread, which);
  const double together = metric_columns.cwiseProduct(spread_columns).sum();
  const MatrixD own_metric = columns_of(metric_columns.transpose(), which);
  const MatrixD own_spread = columns_of(spread_columns.transpose(), which);
  const double alone = own_metric.cwiseProduct(own_spread).sum();
  return alone > 0 ? together / alone : 1;
}

}  // namespace

std::string_view order_name(LatentOrder order) {
  switch (order) {
    case LatentOrder::shared:
      return "shared";
    case LatentOrder::pca:
      return "pca";
    case LatentOrder::hadamard:
      return "hadamard";
  }
  return "";
}

MatrixD hadamard_rotation(Index size) {
  Index power = 1;
  while (size % (2 * power) == 0) {
    power *= 2;
  }
  const Index rest = size / power;
  const auto entry = [&](Index i, Index j) {
    // Sylvester's matrix: the sign is the parity of the common bits.
    const bool odd = __builtin_parityll(static_cast<unsigned long long>((i / rest) & (j / rest))) != 0;
    const double sign = odd ? -1 : 1;
    const auto n = static_cast<double>(rest);
    const auto frequency = static_cast<double>(j % rest);
    const double cosine = frequency == 0
                              ? std::sqrt(1 / n)
                              : std::sqrt(2 / n) * std::cos(std::numbers::pi * frequency *
                                                            (static_cast<double>(i % rest) + 0.5) / n);
    return sign * cosine / std::sqrt(static_cast<double>(power));
  };
  return MatrixD::NullaryExpr(size, size, entry);
}

LatentAttention slice_latent(const LatentAttention& whole, Index parts, LatentOrder order,
                             MomentRef input_moment, const QueryMoments& query_moments) {
  if (whole.branches.size() != 1 || !whole.shared.empty()) {
    throw std::logic_error("slice_latent: the layer has more than one latent");
  }
  const LatentBranch& latent = whole.branches.front();
  const Index n = whole.nope_dim;
  const Index p = whole.rope_dim;
  const Index w = whole.v_dim;
  const Index rank = latent.down.out();
  const MatrixD down = map_of(latent.down);
  const MatrixD moment = second_moment(down, input_moment);
  const MatrixD turn = order == LatentOrder::pca ? backend().symmetric_eigenpairs(moment, rank).vectors
                                                 : hadamard_rotation(rank);
  const bool normed = latent.norm.present();
  const double energy = moment.trace();

  // The gain of the norm acts before the turn is undone, so it joins the up-projection.
  MatrixD up = latent.up.cast<double>();
  if (normed) {
    up = (up * latent.norm.gain.transpose().cast<double>().asDiagonal()).eval();
  }
  up = (up * turn).eval();
  // How scores see the turned latent: Σ_h U^K_hᵀ E[q q ᵀ] U^K_h.
  const MatrixD queries = map_of(whole.q);
  MatrixD metric = MatrixD::Zero(rank, rank);
  for (Index h = 0; h < whole.heads; ++h) {
    const auto asked = queries.middleRows(h * (n + p), n);
    const auto keys = up.middleRows(h * (n + w), n);
    metric += keys.transpose() * (query_moments.of(h).after(asked) * asked.transpose()) * keys;
  }
  // A constant in the latent cancels in the softmax.
  const VectorD mean = turn.transpose() * (down * input_moment.last_column());
  const MatrixD spread = turn.transpose() * moment * turn - mean * mean.transpose();

  LatentAttention out = whole;
  out.branches.clear();
  for (Index b = 0; b < parts; ++b) {
    const std::vector<Index> which = coordinates_of(b, parts, rank, order);
    const MatrixD slice = columns_of(turn, which);
    const double beta = score_factor(metric, spread, which);
    const auto size = static_cast<Index>(which.size());

    LatentBranch branch;
    branch.first_head = latent.first_head;
    branch.head_count = latent.head_count;
    branch.down.weight = (slice.transpose() * latent.down.weight.cast<double>()).cast<float>();
    if (latent.down.bias.size() > 0) {
      branch.down.bias =
          (slice.transpose() * latent.down.bias.transpose().cast<double>()).transpose().cast<float>();
    }
    if (normed) {
      const double own_energy = (slice.transpose() * moment * slice).trace();
      const double gain =
          std::sqrt(own_energy * static_cast<double>(rank) / (energy * static_cast<double>(size)));
      branch.norm.gain = RowVectorF::Constant(size, static_cast<float>(gain));
      branch.norm.eps = latent.norm.eps;
    }
    branch.mean_square = latent.mean_square;
    MatrixD expanded = columns_of(up, which);
    for (Index h = 0; h < latent.head_count; ++h) {
      expanded.middleRows(h * (n + w), n) *= beta;
    }
    branch.up = expanded.cast<float>();
    out.branches.push_back(std::move(branch));
  }
  return out;
}

}  // namespace relatent
