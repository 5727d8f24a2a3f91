// Conjugate gradients on linear systems (Hestenes, Stiefel 1952), preconditioned.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "convert/compute/fit_problem.h"
#include "linalg/threads.h"

namespace relatent {

struct Solution {
  Systems x;
  std::vector<double> gain;  // by how much xᵀAx - 2 bᵀx fell
};

// Whether the matrices of a problem are unknowns of systems that do not depend on each other, or of one.
enum class Coupling { independent, joint };

// Solves A(X) = B from X = 0, with B for the residual and the problem's apply for A.
inline Solution conjugate_gradients(Systems residual, Index steps, const FitProblem& problem,
                                    Coupling coupling = Coupling::independent) {
  const std::size_t count = residual.size();
  Solution out{{}, std::vector<double>(count, 0)};
  Systems direction = problem.precondition(residual);
  // The inner product of each system, or of all together in every place.
  const auto inner = [&](const Systems& a, const Systems& b) {
    std::vector<double> products(count);
    parallel_for(count, [&](std::size_t i) { products[i] = a[i].cwiseProduct(b[i]).sum(); });
    if (coupling == Coupling::joint) {
      std::fill(products.begin(), products.end(), std::accumulate(products.begin(), products.end(), 0.0));
    }
    return products;
  };
  std::vector<double> rz = inner(residual, direction);
  for (const MatrixD& m : residual) {
    out.x.emplace_back(MatrixD::Zero(m.rows(), m.cols()));
  }
  for (Index step = 0; step < steps; ++step) {
    const bool last = step + 1 == steps;
    Systems image = problem.apply(direction);
    const std::vector<double> curvature = inner(direction, image);
    std::vector<char> moved(count, 0);
    parallel_for(count, [&](std::size_t i) {
      if (!(curvature[i] > 0) || !(rz[i] > 0)) {
        return;  // solved, or nothing to solve
      }
      moved[i] = 1;
      const double alpha = rz[i] / curvature[i];
      out.x[i] += alpha * direction[i];
      out.gain[i] += alpha * rz[i];
      if (!last) {
        residual[i] -= alpha * image[i];
      }
    });
    if (last) {
      break;
    }
    image.clear();
    const Systems next = problem.precondition(residual);
    const std::vector<double> next_rz = inner(residual, next);
    parallel_for(count, [&](std::size_t i) {
      if (moved[i] == 0) {
        return;
      }
      direction[i] = next[i] + (next_rz[i] / rz[i]) * direction[i];
      rz[i] = next_rz[i];
    });
  }
  return out;
}

}  // namespace relatent
