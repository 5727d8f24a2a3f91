// What of a map's rows is linearly independent, to the rounding of float64.
#pragma once

#include "linalg/matrix.h"

namespace relatent {

// m = up * basis with as few rows of the basis as there can be. The first first_rank of them give the leading
// rows of m alone.
template <typename Matrix>
struct RowBasis {
  Matrix basis;  // [rank, columns]
  Matrix up;     // [rows, rank]
  // The basis from the rows: basis = pick * m, [rank, rows].
  Matrix pick;
  Index first_rank = 0;

  Index rank() const { return basis.rows(); }
};

// Of the rows of m [rows, columns], of which the first `leading` are looked at first. Independent rows are
// their own basis. Where the others are no larger than what they are made of (copies, say), rows of m are the
// basis; else it is orthonormal, so that nothing is made larger than it is.
RowBasis<MatrixD> row_basis(const MatrixD& m, Index leading = 0);
RowBasis<MatrixC> row_basis(const MatrixC& m);

}  // namespace relatent
