// Linear maps and norms on rows of activations.
#pragma once

#include "convert/model/attention.h"
#include "linalg/matrix.h"

namespace relatent {

// Some rows of a larger matrix.
using ConstRows = Eigen::Ref<const MatrixF, 0, Eigen::OuterStride<>>;
using Rows = Eigen::Ref<MatrixF, 0, Eigen::OuterStride<>>;

// x weightᵀ + bias: x [rows, in] -> [rows, out]
MatrixF product(const Linear& linear, const MatrixF& x);

// x = norm(x), row by row; a gain shorter than a row normalises every run of its size, an empty one nothing.
void normalise(const RmsNorm& norm, MatrixF& x);
MatrixF normed(const RmsNorm& norm, const ConstRows& hidden);

// 1 / √(mean((rows x)²) + eps) for every row of x [length, hidden]; empty without rows.
VectorF inverse_rms(const MatrixF& rows, float eps, const ConstRows& x);

}  // namespace relatent
