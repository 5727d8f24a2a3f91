#include "convert/latent/norm_completion.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "linalg/decompose.h"
#include "linalg/moments.h"

namespace relatent {
namespace {

// Every coordinate keeps at least this part of an equal share of ρ², so that its scale can be undone.
constexpr double smallest_share = 1e-4;
// Below this part of the largest mean square a coordinate is dead: its scale means nothing, and what rounding
// and few tokens leave of it must not be blown up to a share of ρ².
constexpr double dead = 1e-9;
// Directions of the input that vary less than this part of the mean over directions are not brought to mean
// square 1: on other tokens they may vary more.
constexpr double least_variance = 1e-3;
// Against directions that the inputs hardly ever take.
constexpr double constant_ridge = 1e-6;
constexpr int max_sweeps = 2000;
constexpr double converged = 1e-9;
// Rows of inputs taken at once.
constexpr Index row_block = 4096;

// The w of 1 ≈ wᵀ x̃ by least squares over the inputs.
VectorD nearest_to_one(const MatrixF& inputs, const MatrixD& input_moment) {
  const VectorD mean = inputs.colwise().sum().transpose().cast<double>() / static_cast<double>(inputs.rows());
  return ridge_solve(input_moment, mean, constant_ridge);
}

MatrixF squares_of(const MatrixF& map, const MatrixF& inputs, Index first, Index rows) {
  MatrixF y(rows, map.rows());
  y.noalias() = inputs.middleRows(first, rows) * map.transpose();
  return y.array().square();
}

MatrixF stacked(const MatrixD& latent, const MatrixD& extra) {
  MatrixF out(latent.rows() + extra.rows(), latent.cols());
  out << latent.cast<float>(), extra.cast<float>();
  return out;
}

// min |A^½ t - ...|² over t_j >= floor by coordinate descent on the normal equations A t = b.
VectorD bounded_least_squares(const MatrixD& a, const VectorD& b, double floor) {
  VectorD t = VectorD::Constant(b.size(), std::max(floor, 1 / static_cast<double>(b.size())));
  VectorD gradient = a * t - b;
  for (int sweep = 0; sweep < max_sweeps; ++sweep) {
    double moved = 0;
    for (Index j = 0; j < t.size(); ++j) {
      if (!(a(j, j) > 0)) {
        continue;
      }
      const double next = std::max(floor, t(j) - gradient(j) / a(j, j));
      const double step = next - t(j);
      if (step != 0) {
        gradient += step * a.col(j);
        t(j) = next;
        moved = std::max(moved, std::abs(step));
      }
    }
    if (moved < converged) {
      break;
    }
  }
  return t;
}

}  // namespace

NormCompletion complete_norm(const MatrixD& latent, const MatrixF& inputs, const MatrixD& input_moment,
                             Index extra_count) {
  NormCompletion out;
  out.extra = MatrixD::Zero(extra_count, latent.cols());
  const Index found = std::min(extra_count, input_moment.rows());
  if (found > 0) {
    const VectorD constant = nearest_to_one(inputs, input_moment);
    const double square = constant.dot(input_moment * constant);
    if (square > 0) {
      out.extra.row(0) = constant.transpose() / std::sqrt(square);
    }
    const Eigenpairs<MatrixD> eigen = symmetric_eigenpairs(input_moment, found);
    const double raised = least_variance * input_moment.diagonal().mean();
    for (Index i = 0; i + 1 < found; ++i) {
      if (eigen.values(i) > dead * eigen.values(0)) {
        out.extra.row(i + 1) = eigen.vectors.col(i).transpose() / std::sqrt(eigen.values(i) + raised);
      }
    }
  }
  const MatrixF map = stacked(latent, out.extra);
  const Index size = map.rows();
  MatrixD moment = MatrixD::Zero(size, size);
  VectorD mean = VectorD::Zero(size);
  for (Index first = 0; first < inputs.rows(); first += row_block) {
    const MatrixF squares = squares_of(map, inputs, first, std::min(row_block, inputs.rows() - first));
    add_second_moment(squares, moment);
    mean += squares.cast<double>().colwise().sum().transpose();
  }
  mirror_lower(moment);
  const auto tokens = static_cast<double>(inputs.rows());
  moment /= tokens;
  mean /= tokens;
  // In units of each coordinate's mean square: t_j = s_j² mean_j, target 1.
  const double largest = mean.maxCoeff();
  VectorD unit(size);
  for (Index j = 0; j < size; ++j) {
    unit(j) = mean(j) > dead * largest ? 1 / mean(j) : 0;
  }
  const MatrixD a = unit.asDiagonal() * moment * unit.asDiagonal();
  const VectorD b = unit.cwiseProduct(mean);
  const VectorD t = bounded_least_squares(a, b, smallest_share / static_cast<double>(size));
  out.square.resize(size);
  for (Index j = 0; j < size; ++j) {
    // Of a dead coordinate any scale will do that leaves it dead.
    out.square(j) = unit(j) > 0 ? t(j) * unit(j) : (largest > 0 ? 1 / largest : 1);
  }
  return out;
}

VectorF inverse_norm(const NormCompletion& norm, const MatrixD& latent, const MatrixF& inputs) {
  const MatrixF map = stacked(latent, norm.extra);
  const VectorF square = norm.square.cast<float>();
  return (squares_of(map, inputs, 0, inputs.rows()) * square).cwiseMax(1e-12F).cwiseSqrt().cwiseInverse();
}

}  // namespace relatent
