#include "convert/latent/branch_norms.h"

#include <Eigen/Dense>
#include <cmath>
#include <stdexcept>

#include "convert/latent/maps.h"

namespace relatent {
namespace {

// Mean square of the stored latent: far above any engine's eps (1e-6 or 1e-5), far below float16's end.
constexpr double stored_mean_square = 256;

}  // namespace

void store_normed(const MatrixD& latent, const NormCompletion& norm, LatentBranch& branch) {
  const Index r = latent.rows();
  const Index size = norm.square.size();
  const VectorD scale = norm.square.cwiseSqrt() * std::sqrt(static_cast<double>(size));
  MatrixD down(size, latent.cols());
  down << latent, norm.extra;
  down = (std::sqrt(stored_mean_square) * scale.asDiagonal() * down).eval();
  branch.down = linear_of(down);
  MatrixF up = MatrixF::Zero(branch.up.rows(), size);
  up.leftCols(r) = (branch.up.cast<double>() * scale.head(r).cwiseInverse().asDiagonal()).cast<float>();
  branch.up = std::move(up);
  branch.norm = {RowVectorF::Ones(size), 1e-6F};
}

void normalise_branches(LatentAttention& attention, const MatrixF& inputs, const MatrixD& input_moment,
                        Index extra) {
  NormCompletion norm = added_coordinates(inputs, input_moment, extra);
  for (LatentBranch& branch : attention.branches) {
    const Linear common =
        branch.shared ? attention.shared[static_cast<std::size_t>(*branch.shared)] : Linear{};
    const Index shared = common.out();
    MatrixD latent = MatrixD::Zero(shared + branch.down.out(), inputs.cols());
    if (shared > 0) {
      latent.topLeftCorner(shared, inputs.cols() - 1) = common.weight.cast<double>();
    }
    latent.bottomLeftCorner(branch.down.out(), inputs.cols() - 1) = branch.down.weight.cast<double>();
    if (branch.down.bias.size() > 0 || common.bias.size() > 0) {
      throw std::logic_error("normalise_branches: a latent has a bias");
    }
    fit_norm(latent, inputs, input_moment, norm);
    store_normed(latent, norm, branch);
    branch.shared.reset();
  }
  attention.shared.clear();
}

}  // namespace relatent
