// Products with a weight in bfloat16, summed in float32, on processors that have instructions for it.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "linalg/dtype.h"
#include "linalg/matrix.h"

namespace relatent {

// Whether this build and this processor can (oneDNN with AVX512_BF16 or AMX).
bool has_bf16_products();

// y = x Wᵀ with W, and x when it is multiplied, rounded to bfloat16; a weight that was stored as bfloat16 is
// exact. Each call runs on the thread that makes it, so results do not depend on how many there are.
class PackedWeight {
 public:
  using Rows = Eigen::Ref<const MatrixF, 0, Eigen::OuterStride<>>;

  // weight [out, in]. Throws std::logic_error where there are no such products.
  explicit PackedWeight(const MatrixF& weight);
  // The same of a weight as it is stored: out * in bfloat16 numbers (std::invalid_argument otherwise), row by
  // row.
  PackedWeight(std::span<const std::byte> bf16, Index out, Index in);
  // The same of Wᵀ, [in, out].
  static PackedWeight of_transposed(const Rows& weight);
  PackedWeight(PackedWeight&&) noexcept;
  PackedWeight& operator=(PackedWeight&&) noexcept;
  ~PackedWeight();

  Index out() const { return out_; }
  Index in() const { return in_; }
  // x [rows, in] -> [rows, out]. Callable from several threads.
  MatrixF operator()(const Rows& x) const;
  // The same of xᵀ, [in, rows].
  MatrixF times_transposed(const Rows& x) const;

 private:
  struct Blocked;
  PackedWeight(Index out, Index in);
  // From numbers of a type, one of the output's `out_step` after the other and one of the input's `in_step`.
  void block(const void* values, DType type, Index out_step, Index in_step);
  MatrixF multiply(Index rows, const float* x, Index row_step, Index in_step) const;
  Index out_;
  Index in_;
  std::unique_ptr<Blocked> blocked_;
};

// A map that many rows are sent through, in the type that its products are formed in.
class ProductMap {
 public:
  // map [out, in]; compute: bf16 to pack it, where there are such products, or else f32.
  ProductMap(MatrixF map, DType compute);
  Index out() const { return packed_ ? packed_->out() : map_.rows(); }
  // x [rows, in] -> x mapᵀ, [rows, out]. Callable from several threads.
  MatrixF operator()(const PackedWeight::Rows& x) const;

 private:
  MatrixF map_;
  std::optional<PackedWeight> packed_;  // instead
};

}  // namespace relatent
