#include "convert/latent/norm_completion.h"

#include <Eigen/Dense>
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "convert/compute/backend.h"

namespace relatent {
namespace {

// Every coordinate keeps at least this part of an equal share of ρ², so that its scale can be undone.
constexpr double smallest_share = 1e-4;
// Directions of the input that vary less than this part of the largest are not added.
constexpr double dead = 1e-9;
// A coordinate is taken to vary by at least this part of what it would if the inputs varied alike in all
// directions: on other tokens those that the sample lacks may vary more.
constexpr double least_variance = 1e-3;
// What is tried against fitting the sample more closely than other tokens: added to the diagonal, relative to
// its mean. The map nearest to 1 and the shares of ρ² choose for themselves.
constexpr std::array<double, 8> map_ridges = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10};
constexpr std::array<double, 6> share_ridges = {1e-5, 1e-3, 1e-2, 1e-1, 1, 10};
constexpr int max_sweeps = 2000;
constexpr double converged = 1e-9;

// Rows of the first half: sequences lie one after another, so that no half knows all of the other's.
Index first_half(const MatrixF& inputs) {
  return inputs.rows() / 2;
}

// Mean of (1 - tᵀ x)² over the rows that these are the moments of.
double miss(const MeanMoments& moments, const VectorD& t) {
  return 1 - 2 * t.dot(moments.mean) + t.dot(moments.second * t);
}

// The w of 1 ≈ wᵀ x̃ by least squares over the inputs.
struct NearestToOne {
  VectorD map;
  // The same from the first and the second half of the inputs, with the ridge that is best for the other
  // half.
  std::array<VectorD, 2> halves;
};

NearestToOne nearest_to_one(const MatrixF& inputs, const MatrixD& input_moment) {
  const Index middle = first_half(inputs);
  const std::array<MeanMoments, 2> halves = {backend().mean_moments(inputs, 0, middle),
                                             backend().mean_moments(inputs, middle, inputs.rows() - middle)};
  NearestToOne out;
  double best = std::numeric_limits<double>::infinity();
  double best_ridge = 0;
  for (const double ridge : map_ridges) {
    std::array<VectorD, 2> maps;
    for (std::size_t i = 0; i < maps.size(); ++i) {
      maps[i] = backend().ridge_solve(halves[i].second, halves[i].mean, ridge);
    }
    const double missed = miss(halves[1], maps[0]) + miss(halves[0], maps[1]);
    if (missed < best) {
      best = missed;
      best_ridge = ridge;
      out.halves = std::move(maps);
    }
  }
  const VectorD mean = inputs.colwise().sum().transpose().cast<double>() / static_cast<double>(inputs.rows());
  out.map = backend().ridge_solve(input_moment, mean, best_ridge);
  return out;
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

// The t >= floor of 1 ≈ tᵀ u, drawn towards shares in proportion to the mean of u, which is small where a
// coordinate hardly varies on the sample: what it does on other tokens nobody knows.
VectorD shares_of(const MeanMoments& moments, double ridge, double floor) {
  const VectorD& drawn = moments.mean;
  const double square = drawn.dot(moments.second * drawn);
  const double share = square > 0 ? drawn.squaredNorm() / square : 1;
  const double added = ridge * moments.second.diagonal().mean();
  MatrixD a = moments.second;
  a.diagonal().array() += added;
  return bounded_least_squares(a, moments.mean + added * share * drawn, floor);
}

// Of each coordinate t_j, in units of what squares are of.
VectorD shares_of(const std::array<MeanMoments, 2>& halves, const MeanMoments& all) {
  const double floor = smallest_share / static_cast<double>(all.mean.size());
  double best = std::numeric_limits<double>::infinity();
  double best_ridge = 0;
  for (const double ridge : share_ridges) {
    const double missed = miss(halves[1], shares_of(halves[0], ridge, floor)) +
                          miss(halves[0], shares_of(halves[1], ridge, floor));
    if (missed < best) {
      best = missed;
      best_ridge = ridge;
    }
  }
  return shares_of(all, best_ridge, floor);
}

}  // namespace

NormCompletion added_coordinates(const MatrixF& inputs, const MatrixD& input_moment, Index count) {
  NormCompletion out;
  out.extra = MatrixD::Zero(count, input_moment.rows());
  const Index found = std::min(count, input_moment.rows());
  if (found == 0) {
    return out;
  }
  const NearestToOne constant = nearest_to_one(inputs, input_moment);
  const double square = constant.map.dot(input_moment * constant.map);
  if (square > 0) {
    out.extra.row(0) = constant.map.transpose() / std::sqrt(square);
    for (std::size_t i = 0; i < constant.halves.size(); ++i) {
      out.constant_of_half[i] = constant.halves[i] / std::sqrt(square);
    }
  }
  const Eigenpairs<MatrixD> eigen = backend().symmetric_eigenpairs(input_moment, found);
  const double raised = least_variance * input_moment.diagonal().mean();
  for (Index i = 0; i + 1 < found; ++i) {
    if (eigen.values(i) > dead * eigen.values(0)) {
      out.extra.row(i + 1) = eigen.vectors.col(i).transpose() / std::sqrt(eigen.values(i) + raised);
    }
  }
  return out;
}

void fit_norm(const MatrixD& latent, const MatrixF& inputs, const MatrixD& input_moment,
              NormCompletion& norm) {
  const MatrixF map = stacked(latent, norm.extra);
  const Index size = map.rows();
  std::optional<CoordinateByHalf> constant;
  if (norm.constant_of_half[0].size() > 0) {
    // As on tokens that it was not fitted on: either half is shown the other's.
    constant = CoordinateByHalf{latent.rows(), {norm.constant_of_half[1], norm.constant_of_half[0]}};
  }
  const double alike = least_variance * input_moment.diagonal().mean();
  VectorD least(size);
  for (Index j = 0; j < size; ++j) {
    least(j) = alike * static_cast<double>(map.row(j).squaredNorm());
  }
  // In units of each coordinate's mean square: t_j = s_j² unit_j.
  const SquareMoments moments = backend().square_moments(map, constant, least, inputs);
  const VectorD t = shares_of(moments.halves, moments.all);
  norm.square.resize(size);
  for (Index j = 0; j < size; ++j) {
    // Of a coordinate that is always 0 any scale will do.
    norm.square(j) = moments.unit(j) > 0 ? t(j) * moments.unit(j) : 1;
  }
}

NormCompletion complete_norm(const MatrixD& latent, const MatrixF& inputs, const MatrixD& input_moment,
                             Index extra_count) {
  NormCompletion out = added_coordinates(inputs, input_moment, extra_count);
  fit_norm(latent, inputs, input_moment, out);
  return out;
}

}  // namespace relatent
