#include "convert/latent/query_rank.h"

#include <Eigen/Dense>
#include <cmath>
#include <stdexcept>
#include <string>

#include "convert/compute/backend.h"

namespace relatent {
namespace {

// Directions of the input below this part of its largest variance count as this large.
constexpr double variance_floor = 1e-12;

}  // namespace

void compress_query(LatentAttention& attention, MomentRef input_moment, Index rank) {
  const Index hidden = attention.q.weight.cols();
  if (attention.q_down.out() > 0 || rank < 1 || rank > hidden) {
    throw std::invalid_argument("compress_query: rank " + std::to_string(rank));
  }
  const MatrixD second = input_moment.matrix().topLeftCorner(hidden, hidden);
  const Index n = attention.nope_dim;
  const Index p = attention.rope_dim;
  const MatrixD key = attention.rotary_key.weight.cast<double>();
  const VectorD key_square = (key * second).cwiseProduct(key).rowwise().sum();
  MatrixD weighed = attention.q.weight.cast<double>();
  for (Index h = 0; h < attention.heads; ++h) {
    const Index first = h * (n + p) + n;
    // A rotation mixes the two rows of a pair.
    for (Index i = 0; i < p / 2; ++i) {
      const double weight = std::sqrt((key_square(i) + key_square(i + p / 2)) / 2);
      weighed.row(first + i) *= weight;
      weighed.row(first + i + p / 2) *= weight;
    }
  }
  const SymmetricRoot root = backend().symmetric_root(second, variance_floor);
  const MatrixD rows = weighed * root.root;
  MatrixD energy = MatrixD::Zero(hidden, hidden);
  energy.selfadjointView<Eigen::Lower>().rankUpdate(rows.transpose());
  energy.triangularView<Eigen::StrictlyUpper>() = energy.transpose();
  const MatrixD basis = backend().symmetric_eigenpairs(energy, rank).vectors;
  const MatrixD down = basis.transpose() * root.inverse;
  // What q acts on has mean square 1 in every coordinate.
  const VectorD spread = (down * second).cwiseProduct(down).rowwise().sum();
  attention.q_down = {down.cast<float>(), {}};
  attention.q_mean_square = spread.mean();
  attention.q.weight = (attention.q.weight.cast<double>() * (root.root * basis)).cast<float>();
}

}  // namespace relatent
