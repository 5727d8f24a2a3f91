#include "convert/compute/cpu/latent_norm.h"

#include <Eigen/Dense>
#include <algorithm>

#include "convert/compute/cpu/products.h"
#include "linalg/moments.h"

namespace relatent {
namespace {

// Rows of inputs taken at once.
constexpr Index row_block = 4096;

MatrixF squares_of(const MatrixF& map, const MatrixF& inputs) {
  MatrixF y(inputs.rows(), map.rows());
  y.noalias() = inputs * map.transpose();
  return y.array().square();
}

}  // namespace

VectorF inverse_norm(const NormCompletion& norm, const MatrixD& latent, const MatrixF& inputs) {
  MatrixF map(latent.rows() + norm.extra.rows(), latent.cols());
  map << latent.cast<float>(), norm.extra.cast<float>();
  const VectorF square = norm.square.cast<float>();
  return (squares_of(map, inputs) * square).cwiseMax(1e-12F).cwiseSqrt().cwiseInverse();
}

VectorF latent_shrink(const AbsorbedAttention& attention, const MatrixF& inputs) {
  if (attention.norm.present()) {
    return inverse_norm(attention.norm, attention.latent(), inputs);
  }
  return inverse_rms(attention.norm_rows, attention.norm_eps, inputs.leftCols(inputs.cols() - 1));
}

MeanMoments mean_moments(const MatrixF& inputs, Index first, Index count) {
  MeanMoments out{MatrixD::Zero(inputs.cols(), inputs.cols()), VectorD::Zero(inputs.cols())};
  for (Index start = first; start < first + count; start += row_block) {
    const MatrixF rows = inputs.middleRows(start, std::min(row_block, first + count - start));
    add_second_moment(rows, out.second);
    out.mean += rows.cast<double>().colwise().sum().transpose();
  }
  mirror_lower(out.second);
  const auto tokens = static_cast<double>(std::max<Index>(count, 1));
  out.second /= tokens;
  out.mean /= tokens;
  return out;
}

SquareMoments square_moments(const MatrixF& map, const std::optional<CoordinateByHalf>& by_half,
                             const VectorD& least, const MatrixF& inputs) {
  const Index tokens = inputs.rows();
  const Index middle = tokens / 2;
  MatrixF squares = squares_of(map, inputs);
  if (by_half) {
    const VectorF first = by_half->maps[0].cast<float>();
    const VectorF second = by_half->maps[1].cast<float>();
    auto shown = squares.col(by_half->index);
    shown.head(middle) = (inputs.topRows(middle) * first).array().square();
    shown.tail(tokens - middle) = (inputs.bottomRows(tokens - middle) * second).array().square();
  }
  const VectorD mean = squares.cast<double>().colwise().mean().transpose();
  SquareMoments out;
  out.unit = (mean + least).unaryExpr([](double square) { return square > 0 ? 1 / square : 0; });
  squares *= out.unit.cast<float>().asDiagonal();
  out.halves = {mean_moments(squares, 0, middle), mean_moments(squares, middle, tokens - middle)};
  out.all = mean_moments(squares, 0, tokens);
  return out;
}

}  // namespace relatent
