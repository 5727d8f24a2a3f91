// Complex numbers in real maps: pairs of rows and of columns.
#pragma once

#include <complex>

#include "linalg/matrix.h"

namespace relatent {

// Writes the real form of multiplication by z into rows (row, row + row_half) and columns (col, col +
// col_half).
inline void put_complex(MatrixD& m, Index row, Index row_half, Index col, Index col_half,
                        std::complex<double> z) {
  m(row, col) = z.real();
  m(row, col + col_half) = -z.imag();
  m(row + row_half, col) = z.imag();
  m(row + row_half, col + col_half) = z.real();
}

}  // namespace relatent
