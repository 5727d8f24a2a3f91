// The matrix types every other folder speaks.
#pragma once

#include <Eigen/Core>
#include <complex>

namespace relatent {

using Eigen::Index;

// Weights and activations: float32, row-major, so that a [out, in] weight has the layout it has on disk.
using MatrixF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using VectorF = Eigen::VectorXf;
using RowVectorF = Eigen::RowVectorXf;

// Moments, eigenproblems and solves: float64, column-major as LAPACK wants them.
using MatrixD = Eigen::MatrixXd;
using VectorD = Eigen::VectorXd;
using MatrixC = Eigen::MatrixXcd;

}  // namespace relatent
