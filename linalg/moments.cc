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
// Rows that are widened at a time, so that what is multiplied has not left the cache yet.
constexpr Index panel = 512;

// sum += yᵀ x, of the columns of y from y_start on and those of x from x_start on.
void add_tile(const MatrixF& y, Index y_start, const MatrixF& x, Index x_start, Eigen::Ref<MatrixD> sum) {
  for (Index first = 0; first < x.rows(); first += panel) {
    const Index count = std::min(panel, x.rows() - first);
    const RowsD left = y.block(first, y_start, count, sum.rows()).cast<double>();
    const RowsD right = x.block(first, x_start, count, sum.cols()).cast<double>();
    sum.noalias() += left.transpose() * right;
  }
}

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
    if (row != col) {
      add_tile(x, row, x, col, sum.block(row, col, rows, cols));
      return;
    }
    for (Index first = 0; first < x.rows(); first += panel) {
      const RowsD part = x.block(first, row, std::min(panel, x.rows() - first), rows).cast<double>();
      sum.block(row, row, rows, rows).selfadjointView<Eigen::Lower>().rankUpdate(part.transpose());
    }
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
    add_tile(y, row, x, col,
             sum.block(row, col, std::min(tile, y.cols() - row), std::min(tile, x.cols() - col)));
  });
}

void mirror_lower(MatrixD& m) {
  const Index size = m.rows();
  parallel_for(static_cast<std::size_t>((size + tile - 1) / tile), [&](std::size_t t) {
    const Index top = static_cast<Index>(t) * tile;
    const Index height = std::min(tile, size - top);
    m.block(top, top, height, height).triangularView<Eigen::StrictlyUpper>() =
        m.block(top, top, height, height).transpose();
    for (Index right = top + height; right < size; right += tile) {
      const Index width = std::min(tile, size - right);
      m.block(top, right, height, width) = m.block(right, top, width, height).transpose();
    }
  });
}

}  // namespace relatent
