#include "convert/latent/row_basis.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace relatent {
namespace {

// Where the squares of what every row adds to those before it are no smaller than this part of its own, which
// is far above the rounding of a product, rows are independent.
constexpr double surely_independent = 1e-9;

template <typename Matrix>
bool has_independent_rows(const Matrix& unit) {
  if (unit.rows() > unit.cols()) {
    return false;
  }
  const Matrix gram = unit * unit.adjoint();
  const Eigen::LLT<Matrix> factor(gram);
  if (factor.info() != Eigen::Success) {
    return false;
  }
  const auto lower = factor.matrixLLT().diagonal();
  return lower.size() == 0 || lower.cwiseAbs2().minCoeff() > surely_independent;
}

// Independent rows among some, with an orthonormal basis of what they span.
template <typename Matrix>
struct Pivots {
  std::vector<Index> rows;
  Matrix span;  // [columns, rank]
};

// rows: of length 1 at most, and those that are shorter than rounding count as zero.
template <typename Matrix>
Pivots<Matrix> pivots_of(const Matrix& rows) {
  Pivots<Matrix> out{{}, Matrix(rows.cols(), 0)};
  if (rows.rows() == 0) {
    return out;
  }
  Eigen::ColPivHouseholderQR<Matrix> qr(rows.adjoint());
  const double rounding =
      8 * static_cast<double>(std::max(rows.rows(), rows.cols())) * std::numeric_limits<double>::epsilon();
  Index rank = 0;
  while (rank < std::min(rows.rows(), rows.cols()) && std::abs(qr.matrixQR()(rank, rank)) > rounding) {
    ++rank;
  }
  for (Index i = 0; i < rank; ++i) {
    out.rows.push_back(qr.colsPermutation().indices()(i));
  }
  out.span = qr.householderQ() * Matrix::Identity(rows.cols(), rank);
  return out;
}

template <typename Matrix>
RowBasis<Matrix> basis_of(const Matrix& m, Index leading) {
  const VectorD sizes = m.rowwise().norm();
  const VectorD scale = (sizes.array() > 0).select(sizes, 1);
  const Matrix unit = scale.cwiseInverse().asDiagonal() * m;
  if (has_independent_rows(unit)) {
    return {m, Matrix::Identity(m.rows(), m.rows()), Matrix::Identity(m.rows(), m.rows()), leading};
  }
  Pivots<Matrix> first = pivots_of<Matrix>(unit.topRows(leading));
  Matrix rest = unit.bottomRows(m.rows() - leading);
  for (int pass = 0; pass < 2; ++pass) {  // the second takes away what rounding left
    rest -= (rest * first.span).eval() * first.span.adjoint();
  }
  Pivots<Matrix> second = pivots_of<Matrix>(rest);

  std::vector<Index> rows = std::move(first.rows);
  std::sort(rows.begin(), rows.end());
  const auto first_rank = static_cast<Index>(rows.size());
  std::sort(second.rows.begin(), second.rows.end());
  for (const Index row : second.rows) {
    rows.push_back(leading + row);
  }
  const auto rank = static_cast<Index>(rows.size());
  Matrix span(m.cols(), rank);
  span << first.span, second.span;
  const Matrix inside = unit * span;  // unit = inside spanᴴ
  Matrix corner(rank, rank);
  for (Index i = 0; i < rank; ++i) {
    corner.row(i) = inside.row(rows[static_cast<std::size_t>(i)]);
  }
  const Eigen::PartialPivLU<Matrix> solver(corner.adjoint());
  Matrix weights =
      solver.solve(inside.adjoint()).adjoint();  // of the chosen rows in every row, all of length 1
  for (Index i = 0; i < rank; ++i) {
    weights.row(rows[static_cast<std::size_t>(i)]) = Matrix::Identity(rank, rank).row(i);
  }
  RowBasis<Matrix> out;
  out.first_rank = first_rank;
  out.pick = Matrix::Zero(rank, m.rows());
  const bool grows = rank > 0 && weights.cwiseAbs().rowwise().sum().maxCoeff() > 1 + surely_independent;
  if (grows) {
    const Matrix back = solver.inverse().adjoint();
    for (Index i = 0; i < rank; ++i) {
      const Index row = rows[static_cast<std::size_t>(i)];
      out.pick.col(row) = back.col(i) / scale(row);
    }
    out.basis = span.adjoint();
    out.up = scale.asDiagonal() * inside;
    // Keys are made of the first alone.
    out.up.block(0, first_rank, leading, rank - first_rank).setZero();
    return out;
  }
  out.basis.resize(rank, m.cols());
  out.up.resize(m.rows(), rank);
  for (Index i = 0; i < rank; ++i) {
    const Index row = rows[static_cast<std::size_t>(i)];
    out.pick(i, row) = 1;
    out.basis.row(i) = m.row(row);
    out.up.col(i) = scale.cwiseProduct(weights.col(i)) / scale(row);
    out.up(row, i) = 1;
  }
  out.up.block(0, first_rank, leading, rank - first_rank).setZero();
  return out;
}

}  // namespace

RowBasis<MatrixD> row_basis(const MatrixD& m, Index leading) {
  return basis_of(m, leading);
}

RowBasis<MatrixC> row_basis(const MatrixC& m) {
  return basis_of(m, 0);
}

}  // namespace relatent
