#include "linalg/decompose.h"

#define lapack_complex_float std::complex<float>
#define lapack_complex_double std::complex<double>
#include <lapacke.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <vector>

#include "linalg/moments.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Right-hand sides that one thread solves for at a time.
constexpr Index solved_columns = 256;
// Eigenvalues of a semi-definite matrix that rounding alone may leave, in parts of the largest; and how far
// below zero sums in float32 may push one before the matrix counts as indefinite.
constexpr double rounding_floor = 1e-12;
constexpr double indefinite = 1e-2;

lapack_int to_lapack(Index n) {
  if (n > std::numeric_limits<lapack_int>::max()) {
    throw std::invalid_argument("matrix dimension " + std::to_string(n) + " is beyond LAPACK's integers");
  }
  return static_cast<lapack_int>(n);
}

std::string in_stage() {
  const std::string path = Stage::path();
  return path.empty() ? "" : " (in: " + path + ")";
}

void check(lapack_int status, std::string_view routine, Index rows, Index cols) {
  if (status == 0) {
    return;
  }
  throw NumericalError(std::string(routine) + " on a " + std::to_string(rows) + " x " + std::to_string(cols) +
                       " matrix ended with status " + std::to_string(status) + in_stage());
}

template <typename Matrix>
void check_input(const Matrix& a, std::string_view routine) {
  if (a.rows() != a.cols()) {
    throw std::invalid_argument(std::string(routine) + " needs a square matrix, got " +
                                std::to_string(a.rows()) + " x " + std::to_string(a.cols()));
  }
  if (!a.allFinite()) {
    throw NumericalError(std::string(routine) + " got a " + std::to_string(a.rows()) + " x " +
                         std::to_string(a.cols()) + " matrix with NaN or infinity in it" + in_stage());
  }
}

// Makes the entry of largest modulus real and positive.
template <typename Vector>
void fix_phase(Vector column) {
  Index largest = 0;
  double modulus = 0;
  for (Index i = 0; i < column.size(); ++i) {
    // The factor keeps entries that are equal up to rounding from trading places.
    if (std::abs(column(i)) > modulus * (1 + 1e-9)) {
      modulus = std::abs(column(i));
      largest = i;
    }
  }
  if (modulus == 0) {
    return;
  }
  const auto pivot = column(largest);
  if constexpr (std::is_same_v<std::decay_t<decltype(pivot)>, double>) {
    if (pivot < 0) {
      column = -column;
    }
  } else {
    column *= std::conj(pivot) / std::abs(pivot);
  }
}

template <typename Matrix, typename Routine>
Eigenpairs<Matrix> leading_eigenpairs(const Matrix& a, std::optional<Index> wanted, std::string_view name,
                                      Routine routine) {
  check_input(a, name);
  const Index n = a.rows();
  const Index k = wanted.value_or(n);
  if (k < 0 || k > n) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(k) +
                                " eigenpairs of a matrix of order " + std::to_string(n));
  }
  Eigenpairs<Matrix> out;
  out.values.resize(k);
  out.vectors.resize(n, k);
  if (k == 0) {
    return out;
  }
  Matrix work = a;
  VectorD ascending(n);
  Matrix vectors(n, k);
  std::vector<lapack_int> support(2 * static_cast<std::size_t>(n));
  lapack_int found = 0;
  check(routine(k == n ? 'A' : 'I', to_lapack(n), work, to_lapack(n - k + 1), to_lapack(n), found, ascending,
                vectors, support),
        name, n, n);
  if (found != k) {
    throw NumericalError(std::string(name) + " found " + std::to_string(found) + " of " + std::to_string(k) +
                         " eigenpairs");
  }
  for (Index j = 0; j < k; ++j) {
    out.values(j) = ascending(k - 1 - j);
    out.vectors.col(j) = vectors.col(k - 1 - j);
    fix_phase(out.vectors.col(j));
  }
  return out;
}

}  // namespace

Eigenpairs<MatrixD> symmetric_eigenpairs(const MatrixD& a, std::optional<Index> k) {
  const Stage stage("eigenproblems");
  return leading_eigenpairs(
      a, k, "dsyevr",
      [](char range, lapack_int n, MatrixD& work, lapack_int first, lapack_int last, lapack_int& found,
         VectorD& values, MatrixD& vectors, std::vector<lapack_int>& support) {
        return LAPACKE_dsyevr(LAPACK_COL_MAJOR, 'V', range, 'L', n, work.data(), n, 0, 0, first, last, 0,
                              &found, values.data(), vectors.data(), n, support.data());
      });
}

Eigenpairs<MatrixC> hermitian_eigenpairs(const MatrixC& a, std::optional<Index> k) {
  const Stage stage("eigenproblems");
  return leading_eigenpairs(
      a, k, "zheevr",
      [](char range, lapack_int n, MatrixC& work, lapack_int first, lapack_int last, lapack_int& found,
         VectorD& values, MatrixC& vectors, std::vector<lapack_int>& support) {
        return LAPACKE_zheevr(LAPACK_COL_MAJOR, 'V', range, 'L', n, work.data(), n, 0, 0, first, last, 0,
                              &found, values.data(), vectors.data(), n, support.data());
      });
}

SymmetricRoot symmetric_root(const MatrixD& a, double floor) {
  const Eigenpairs<MatrixD> eigen = symmetric_eigenpairs(a);
  const Index n = a.rows();
  SymmetricRoot out;
  const double largest = n > 0 ? eigen.values(0) : 0;
  if (largest <= 0) {
    out.root = MatrixD::Identity(n, n);
    out.inverse = MatrixD::Identity(n, n);
    return out;
  }
  const VectorD root = eigen.values.cwiseMax(floor * largest).cwiseSqrt();
  const MatrixD scaled = eigen.vectors * root.asDiagonal();
  const MatrixD scaled_inverse = eigen.vectors * root.cwiseInverse().asDiagonal();
  out.root = scaled * eigen.vectors.transpose();
  out.inverse = scaled_inverse * eigen.vectors.transpose();
  return out;
}

namespace {

// Eigenpairs of a matrix that should be positive semi-definite and that Cholesky refused, with the
// reciprocals of its eigenvalues, or 0 for those that cannot be told from rounding.
Eigenpairs<MatrixD> pseudo_inverse_pairs(const MatrixD& a) {
  Eigenpairs<MatrixD> out = symmetric_eigenpairs(a);
  const double largest = out.values(0);
  const double smallest = out.values(out.values.size() - 1);
  if (smallest < -indefinite * std::max(largest, 0.0)) {
    throw NumericalError("dpotrf got a " + std::to_string(a.rows()) + " x " + std::to_string(a.rows()) +
                         " matrix that is indefinite: eigenvalues from " + std::to_string(smallest) + " to " +
                         std::to_string(largest) + in_stage());
  }
  const double floor = std::max(rounding_floor * largest, -smallest);
  out.values = (out.values.array() > floor).select(out.values.cwiseInverse(), 0);
  return out;
}

}  // namespace

MatrixD ridge_solve(const MatrixD& a, const MatrixD& b, double ridge) {
  const Stage stage("solves");
  check_input(a, "dpotrf");
  if (b.rows() != a.rows()) {
    throw std::invalid_argument("ridge_solve: " + std::to_string(a.rows()) + " equations but " +
                                std::to_string(b.rows()) + " right-hand rows");
  }
  if (!b.allFinite()) {
    throw NumericalError("dpotrf got a right-hand side with NaN or infinity in it");
  }
  const Index n = a.rows();
  MatrixD x = b;
  if (n == 0 || b.cols() == 0) {
    return x;
  }
  MatrixD factor = a;
  factor.diagonal().array() += ridge * a.diagonal().mean();
  if (LAPACKE_dpotrf(LAPACK_COL_MAJOR, 'L', to_lapack(n), factor.data(), to_lapack(n)) != 0) {
    factor = a;
    factor.diagonal().array() += ridge * a.diagonal().mean();
    const Eigenpairs<MatrixD> eigen = pseudo_inverse_pairs(factor);
    const MatrixD turned = eigen.values.asDiagonal() * (eigen.vectors.transpose() * b);
    return eigen.vectors * turned;
  }
  parallel_for(static_cast<std::size_t>((b.cols() + solved_columns - 1) / solved_columns),
               [&](std::size_t i) {
                 const Index first = static_cast<Index>(i) * solved_columns;
                 const Index count = std::min(solved_columns, b.cols() - first);
                 check(LAPACKE_dpotrs(LAPACK_COL_MAJOR, 'L', to_lapack(n), to_lapack(count), factor.data(),
                                      to_lapack(n), x.col(first).data(), to_lapack(n)),
                       "dpotrs", n, count);
               });
  return x;
}

MatrixD positive_inverse(MatrixD a) {
  const Stage stage("solves");
  check_input(a, "dpotrf");
  const Index n = a.rows();
  if (n == 0) {
    return a;
  }
  MatrixD factor = a;
  if (LAPACKE_dpotrf(LAPACK_COL_MAJOR, 'L', to_lapack(n), factor.data(), to_lapack(n)) != 0) {
    const Eigenpairs<MatrixD> eigen = pseudo_inverse_pairs(a);
    return eigen.vectors * eigen.values.asDiagonal() * eigen.vectors.transpose();
  }
  a = std::move(factor);
  check(LAPACKE_dpotri(LAPACK_COL_MAJOR, 'L', to_lapack(n), a.data(), to_lapack(n)), "dpotri", n, n);
  mirror_lower(a);
  return a;
}

}  // namespace relatent
