#include "convert/compute/cpu/products.h"

#include <Eigen/Dense>
#include <cmath>

#include "linalg/stages.h"

namespace relatent {

MatrixF product(const Linear& linear, const MatrixF& x) {
  const Stage stage("products");
  MatrixF y;
  if (linear.packed) {
    y = (*linear.packed)(x);
  } else {
    y.resize(x.rows(), linear.weight.rows());
    y.noalias() = x * linear.weight.transpose();
  }
  if (linear.bias.size() > 0) {
    y.rowwise() += linear.bias;
  }
  return y;
}

void normalise(const RmsNorm& norm, MatrixF& x) {
  const Index size = norm.gain.size();
  for (Index i = 0; size > 0 && i < x.rows(); ++i) {
    for (Index first = 0; first < x.cols(); first += size) {
      auto run = x.row(i).segment(first, size);
      const float inverse = 1.0F / std::sqrt(run.squaredNorm() / static_cast<float>(size) + norm.eps);
      run.array() = (run.array() * inverse) * norm.gain.array();
    }
  }
}

MatrixF normed(const RmsNorm& norm, const ConstRows& hidden) {
  MatrixF x = hidden;
  normalise(norm, x);
  return x;
}

VectorF inverse_rms(const MatrixF& rows, float eps, const ConstRows& x) {
  if (rows.rows() == 0) {
    return {};
  }
  MatrixF y(x.rows(), rows.rows());
  y.noalias() = x * rows.transpose();
  return (y.rowwise().squaredNorm().array() / static_cast<float>(y.cols()) + eps).sqrt().inverse();
}

}  // namespace relatent
