// Dense decompositions in double precision: the one doorway to LAPACKE.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "linalg/matrix.h"

namespace relatent {

// A decomposition that could not be computed: the routine did not converge, or its input holds NaN or
// infinity. what() names the routine, the matrix shape, LAPACK's status and the stage (stages.h).
class NumericalError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Leading eigenpairs of a symmetric or Hermitian matrix, largest eigenvalue first.
// Each eigenvector is scaled so that its entry of largest modulus (the first of them on a tie) is real and
// positive: eigenvectors are then a function of the matrix alone and not of LAPACK's choice of sign.
template <typename Matrix>
struct Eigenpairs {
  VectorD values;  // [k]
  Matrix vectors;  // [n, k], orthonormal columns
};

// The k leading eigenpairs of a (only its lower triangle is read). Without k all. LAPACK dsyevr / zheevr.
// Throws std::invalid_argument when a is not square or k is outside [0, n], NumericalError as above.
Eigenpairs<MatrixD> symmetric_eigenpairs(const MatrixD& a, std::optional<Index> k = {});
Eigenpairs<MatrixC> hermitian_eigenpairs(const MatrixC& a, std::optional<Index> k = {});

// Symmetric square root of a positive semi-definite matrix and its inverse, by eigendecomposition.
// Eigenvalues below floor * (largest eigenvalue) are raised to it, so that the inverse exists. A zero matrix
// gives identities.
struct SymmetricRoot {
  MatrixD root;     // [n, n]
  MatrixD inverse;  // [n, n]
};
SymmetricRoot symmetric_root(const MatrixD& a, double floor);

// Solves (a + ridge * mean(diag a) * I) x = b for symmetric positive semi-definite a [n, n] and b [n, m].
// LAPACK dpotrf, dpotrs. Where the ridge is too small against rounding, x has no part in the directions that
// cannot be told from it. Throws NumericalError when a is indefinite beyond rounding.
MatrixD ridge_solve(const MatrixD& a, const MatrixD& b, double ridge);

// a⁻¹ of a symmetric positive semi-definite matrix (only its lower triangle is read), LAPACK dpotrf, dpotri;
// of a singular one the pseudo-inverse. Throws as ridge_solve.
MatrixD positive_inverse(MatrixD a);

}  // namespace relatent
