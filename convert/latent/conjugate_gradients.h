// Conjugate gradients on one or several independent linear systems (Hestenes, Stiefel 1952), preconditioned.
#pragma once

#include <utility>
#include <vector>

#include "convert/compute/fit_problem.h"
#include "linalg/threads.h"

namespace relatent {

struct Solution {
  Systems x;
  std::vector<double> gain;  // by how much xᵀAx - 2 bᵀx fell
};

// Solves A(X) = B from X = 0, with B for the residual and the problem's apply for A.
inline Solution conjugate_gradients(Systems residual, Index steps, const FitProblem& problem) {
  const std::size_t count = residual.size();
  Solution out{{}, std::vector<double>(count, 0)};
  Systems direction = problem.precondition(residual);
  std::vector<double> rz(count);
  for (std::size_t i = 0; i < count; ++i) {
    out.x.emplace_back(MatrixD::Zero(residual[i].rows(), residual[i].cols()));
    rz[i] = residual[i].cwiseProduct(direction[i]).sum();
  }
  for (Index step = 0; step < steps; ++step) {
    const bool last = step + 1 == steps;
    Systems image = problem.apply(direction);
    std::vector<char> moved(count, 0);
    parallel_for(count, [&](std::size_t i) {
      const double curvature = direction[i].cwiseProduct(image[i]).sum();
      if (!(curvature > 0) || !(rz[i] > 0)) {
        return;  // solved, or nothing to solve
      }
      moved[i] = 1;
      const double alpha = rz[i] / curvature;
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
    parallel_for(count, [&](std::size_t i) {
      if (moved[i] == 0) {
        return;
      }
      const double next_rz = residual[i].cwiseProduct(next[i]).sum();
      direction[i] = next[i] + (next_rz / rz[i]) * direction[i];
      rz[i] = next_rz;
    });
  }
  return out;
}

}  // namespace relatent
