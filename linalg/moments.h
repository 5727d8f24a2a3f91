// Sums of products over many rows of activations, in double precision, the same for any thread count.
#pragma once

#include "linalg/matrix.h"

namespace relatent {

// Adds Σ x xᵀ over the rows of x to the lower triangle of sum [x.cols(), x.cols()].
void add_second_moment(const MatrixF& x, MatrixD& sum);

// Adds Σ y xᵀ over the rows of y and x (as many) to sum [y.cols(), x.cols()].
void add_cross_moment(const MatrixF& y, const MatrixF& x, MatrixD& sum);

// Copies the lower triangle into the upper one.
void mirror_lower(MatrixD& m);

}  // namespace relatent
