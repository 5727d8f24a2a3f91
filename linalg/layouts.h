// Copies between row-major and column-major matrices in tiles: taken column by column, a large row-major
// matrix misses the cache at every element.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "linalg/matrix.h"

namespace relatent {

// float64 as it lies in a row-major matrix.
using RowsD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// target = source, of the same shape, element by element.
template <typename Source, typename Target>
void copy_tiled(const Source& source, Target&& target) {
  constexpr Index tile = 64;
  using Scalar = typename std::decay_t<Target>::Scalar;
  for (Index row = 0; row < source.rows(); row += tile) {
    const Index rows = std::min(tile, source.rows() - row);
    for (Index col = 0; col < source.cols(); col += tile) {
      const Index cols = std::min(tile, source.cols() - col);
      target.block(row, col, rows, cols) = source.block(row, col, rows, cols).template cast<Scalar>();
    }
  }
}

inline MatrixD widened(const MatrixF& m) {
  MatrixD out(m.rows(), m.cols());
  copy_tiled(m, out);
  return out;
}

inline MatrixF narrowed(const MatrixD& m) {
  MatrixF out(m.rows(), m.cols());
  copy_tiled(m, out);
  return out;
}

// Whether no number of these, of the size of Bits, has all bits of its exponent set; compilers handle many at
// a time.
template <typename Bits>
bool no_full_exponent(std::span<const std::byte> bytes, Bits exponent) {
  unsigned bad = 0;
  for (std::size_t i = 0; i + sizeof(Bits) <= bytes.size(); i += sizeof(Bits)) {
    Bits bits = 0;
    std::memcpy(&bits, bytes.data() + i, sizeof bits);
    bad |= static_cast<unsigned>((bits & exponent) == exponent);
  }
  return bad == 0;
}

// Whether no value is NaN or infinite.
inline bool all_finite(const MatrixF& m) {
  return no_full_exponent<std::uint32_t>(
      std::as_bytes(std::span(m.data(), static_cast<std::size_t>(m.size()))), 0x7f800000U);
}

// The same of numbers in bfloat16.
inline bool all_finite_bf16(std::span<const std::byte> bytes) {
  return no_full_exponent<std::uint16_t>(bytes, 0x7f80U);
}

}  // namespace relatent
