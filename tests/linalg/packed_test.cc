#include "linalg/packed.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <array>
#include <random>
#include <vector>

#include "linalg/dtype.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

MatrixF in_bf16(MatrixF m) {
  for (Index i = 0; i < m.size(); ++i) {
    m.data()[i] = rounded(DType::bf16, m.data()[i]);
  }
  return m;
}

MatrixF some(Index rows, Index cols, std::mt19937& random) {
  std::normal_distribution<float> normal;
  return MatrixF::NullaryExpr(rows, cols, [&] { return normal(random); });
}

TEST(PackedWeight, MultipliesRoundedNumbersInFloat32) {
  if (!has_bf16_products()) {
    GTEST_SKIP() << "this processor has no bfloat16 products";
  }
  std::mt19937 random(3);
  for (const auto& [rows, in, out] : {std::array<Index, 3>{1, 7, 5}, {33, 64, 48}, {200, 96, 31}}) {
    const MatrixF weight = some(out, in, random);
    const MatrixF x = some(rows, in, random);
    const PackedWeight packed(weight);
    EXPECT_EQ(packed.out(), out);
    EXPECT_EQ(packed.in(), in);
    const MatrixF y = packed(x);
    const MatrixD expected = in_bf16(x).cast<double>() * in_bf16(weight).cast<double>().transpose();
    EXPECT_LE((y.cast<double>() - expected).norm(), 1e-6 * expected.norm());
    // Without rounding it is another product.
    const MatrixD exact = x.cast<double>() * weight.cast<double>().transpose();
    EXPECT_GT((y.cast<double>() - exact).norm(), 1e-4 * exact.norm());
    EXPECT_THROW(packed(some(2, in + 1, random)), std::invalid_argument);
    std::vector<std::byte> stored(2 * static_cast<std::size_t>(out * in));
    encode_floats(DType::bf16, {weight.data(), static_cast<std::size_t>(weight.size())}, stored);
    EXPECT_TRUE(PackedWeight(stored, out, in)(x) == y);
    EXPECT_THROW(PackedWeight(stored, out + 1, in), std::invalid_argument);
    // The same from any side, and of a part of a larger matrix.
    const MatrixF turned = weight.transpose();
    EXPECT_TRUE(PackedWeight::of_transposed(turned)(x) == y);
    EXPECT_TRUE(packed.times_transposed(MatrixF(x.transpose())) == y);
    MatrixF larger = MatrixF::Constant(in + 2, out + 3, 7);
    larger.block(1, 2, in, out) = turned;
    EXPECT_TRUE(PackedWeight::of_transposed(larger.block(1, 2, in, out))(x) == y);
    larger = MatrixF::Constant(in + 2, rows + 3, 7);
    larger.block(1, 2, in, rows) = x.transpose();
    EXPECT_TRUE(packed.times_transposed(larger.block(1, 2, in, rows)) == y);
    EXPECT_THROW(packed.times_transposed(x.leftCols(in - 1).transpose()), std::invalid_argument);
  }
}

TEST(PackedWeight, SameBytesFromAnyThread) {
  if (!has_bf16_products()) {
    GTEST_SKIP() << "this processor has no bfloat16 products";
  }
  std::mt19937 random(4);
  const PackedWeight packed(some(70, 130, random));
  const MatrixF x = some(50, 130, random);
  const MatrixF expected = packed(x);
  set_num_threads(4);
  std::vector<MatrixF> found(16);
  parallel_for(found.size(), [&](std::size_t i) { found[i] = packed(x); });
  set_num_threads(0);
  for (const MatrixF& y : found) {
    EXPECT_TRUE(y == expected);
  }
}

}  // namespace
}  // namespace relatent
