#include "convert/latent/row_basis.h"

#include <gtest/gtest.h>

#include "tests/support/samples.h"

namespace relatent {
namespace {

using testing_support::Random;

// Far below what float32 weights can say, far above what float64 sums lose.
constexpr double kRounding = 1e-12;

template <typename Matrix>
void expect_basis(const RowBasis<Matrix>& found, const Matrix& m, Index rank) {
  ASSERT_EQ(found.rank(), rank);
  EXPECT_LE((found.up * found.basis - m).norm(), kRounding * m.norm());
  EXPECT_LE((found.pick * m - found.basis).norm(), kRounding * found.basis.norm());
}

TEST(RowBasis, IndependentRowsAreTheirOwn) {
  Random random(1);
  const MatrixD m = random.matrix_d(7, 12);
  const RowBasis<MatrixD> found = row_basis(m, 3);
  EXPECT_TRUE(found.basis == m);
  EXPECT_TRUE(found.up == MatrixD::Identity(7, 7));
  EXPECT_EQ(found.first_rank, 3);
}

TEST(RowBasis, CopiesAreReadFromWhatTheyAreCopiesOf) {
  Random random(2);
  MatrixD m = random.matrix_d(6, 12);
  m.row(4) = m.row(1);
  m.row(5) = -0.5 * m.row(2);
  const RowBasis<MatrixD> found = row_basis(m);
  expect_basis(found, m, 4);
  // Rows as they were, so that nothing of them is rounded again.
  for (Index i = 0; i < found.rank(); ++i) {
    EXPECT_EQ(found.pick.row(i).sum(), 1);
    EXPECT_EQ(found.pick.row(i).cwiseAbs().maxCoeff(), 1);
  }
}

TEST(RowBasis, MoreRowsThanColumnsBecomeOrthonormal) {
  Random random(3);
  const MatrixD m = random.matrix_d(20, 12);
  const RowBasis<MatrixD> found = row_basis(m);
  expect_basis(found, m, 12);
  EXPECT_LE((found.basis * found.basis.transpose() - MatrixD::Identity(12, 12)).norm(), kRounding);
}

TEST(RowBasis, LeadingRowsAreMadeOfTheFirstAlone) {
  Random random(4);
  MatrixD m = random.matrix_d(11, 9);
  m.row(2) = m.row(0);
  m.row(7) = m.row(1) + m.row(5) - 3 * m.row(6);
  const RowBasis<MatrixD> found = row_basis(m, 4);
  expect_basis(found, m, 9);
  EXPECT_EQ(found.first_rank, 3);
  EXPECT_TRUE(found.up.topRightCorner(4, 6).isZero(0));
}

TEST(RowBasis, RowsOfAnySizeCount) {
  Random random(5);
  MatrixD m = random.matrix_d(5, 9);
  m.row(1) *= 1e-14;
  m.row(3) *= 1e12;
  expect_basis(row_basis(m), m, 5);
  m.row(2).setZero();
  expect_basis(row_basis(m), m, 4);
}

TEST(RowBasis, ComplexMultiplesAreOne) {
  Random random(6);
  MatrixC m(4, 9);
  m.real() = random.matrix_d(4, 9);
  m.imag() = random.matrix_d(4, 9);
  m.row(2) = std::complex<double>(0.6, -0.8) * m.row(0);
  const RowBasis<MatrixC> found = row_basis(m);
  expect_basis(found, m, 3);
  // Other than twice as many real rows, which are all independent.
  MatrixD parts(8, 9);
  parts << m.real(), m.imag();
  EXPECT_EQ(row_basis(parts).rank(), 6);
  m.row(3) = m.row(0) + m.row(1);
  expect_basis(row_basis(m), m, 2);
}

TEST(RowBasis, NothingOfNothing) {
  EXPECT_EQ(row_basis(MatrixD(MatrixD::Zero(3, 5))).rank(), 0);
  EXPECT_EQ(row_basis(MatrixD(0, 5)).rank(), 0);
}

}  // namespace
}  // namespace relatent
