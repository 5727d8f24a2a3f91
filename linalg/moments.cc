#include "linalg/moments.h"

#include <Eigen/Dense>
#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "linalg/layouts.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Tiles of the sum are the pieces of work: each is summed over the rows in their order by one thread.
constexpr Index tile = 256;

}  // namespace

void add_second_moment(const MatrixF& x, MatrixD& sum) {
  const Stage stage("moments");
  const Index size = x.cols();
  if (sum.rows() != size || sum.cols() != size) {
    throw std::invalid_argument("add_second_moment: the sum is not square of the size of a row");
  }
  std::vector<std::pair<Index, Index>> lower;
  for (Index i = 0; i < size; i += tile) {
    for (Index j = 0; j <= i; j += tile) {
      lower.emplace_back(i, j);
    }
  }
  parallel_for(lower.size(), [&](std::size_t t) {
    const auto [row, col] = lower[t];
    const Index rows = std::min(tile, size - row);
    const Index cols = std::min(tile, size - col);
    const RowsD left = x.middleCols(row, rows).cast<double>();
    if (row == col) {
      sum.block(row, col, rows, cols).selfadjointView<Eigen::Lower>().rankUpdate(left.transpose());
      return;
    }
    const RowsD right = x.middleCols(col, cols).cast<double>();
    sum.block(row, col, rows, cols).noalias() += left.transpose() * right;
  });
}

void add_cross_moment(const MatrixF& y, const MatrixF& x, MatrixD& sum) {
  if (y.rows() != x.rows() || sum.rows() != y.cols() || sum.cols() != x.cols()) {
    throw std::invalid_argument("add_cross_moment: sizes do not fit together");
  }
  std::vector<std::pair<Index, Index>> tiles;
  for (Index i = 0; i < y.cols(); i += tile) {
    for (Index j = 0; j < x.cols(); j += tile) {
      tiles.emplace_back(i, j);
    }
  }
  parallel_for(tiles.size(), [&](std::size_t t) {
    const auto [row, col] = tiles[t];
    const Index rows = std::min(tile, y.cols() - row);
    const Index cols = std::min(tile, x.cols() - col);
    const RowsD left = y.middleCols(row, rows).cast<double>();
    const RowsD right = x.middleCols(col, cols).cast<double>();
    sum.block(row, col, rows, cols).noalias() += left.transpose() * right;
  });
}

void mirror_lower(MatrixD& m) {
  m.triangularView<Eigen::StrictlyUpper>() = m.transpose();
}

}  // namespace relatent
