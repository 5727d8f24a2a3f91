#include "linalg/decompose.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/support/samples.h"

namespace relatent {
namespace {

using testing_support::Random;
using testing_support::relative_error;

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What backward stable algorithms promise, with room for their constants.
double noise(Index n) {
  return 30 * static_cast<double>(n) * kEpsilon;
}

template <typename Matrix>
class Eigenproblem : public testing::Test {
 protected:
  using Scalar = typename Matrix::Scalar;
  static constexpr bool is_complex = !std::is_same_v<Scalar, double>;

  static Matrix random_matrix(Random& random, Index rows, Index cols) {
    return Matrix::NullaryExpr(rows, cols, [&] {
      const double re = random.number();
      if constexpr (is_complex) {
        return Scalar(re, random.number());
      } else {
        return re;
      }
    });
  }
  // An orthonormal basis by Gram and Schmidt, twice for good measure.
  static Matrix random_basis(Random& random, Index n) {
    Matrix out = random_matrix(random, n, n);
    for (Index j = 0; j < n; ++j) {
      for (int pass = 0; pass < 2; ++pass) {
        const Matrix before = out.leftCols(j);
        out.col(j) -= before * (before.adjoint() * out.col(j));
      }
      out.col(j).normalize();
    }
    return out;
  }
  static Matrix with_spectrum(const Matrix& basis, const VectorD& values) {
    const Matrix scaled = basis * values.asDiagonal();
    return scaled * basis.adjoint();
  }
  static Eigenpairs<Matrix> solve(const Matrix& a, std::optional<Index> k = {}) {
    if constexpr (is_complex) {
      return hermitian_eigenpairs(a, k);
    } else {
      return symmetric_eigenpairs(a, k);
    }
  }
  static constexpr const char* routine = is_complex ? "zheevr" : "dsyevr";
};

using MatrixTypes = testing::Types<MatrixD, MatrixC>;
TYPED_TEST_SUITE(Eigenproblem, MatrixTypes);

TYPED_TEST(Eigenproblem, PairsOfAPlantedSpectrum) {
  Random random(1);
  for (const Index n : {1, 2, 5, 40}) {
    VectorD values = VectorD::LinSpaced(n, 3, -2);
    if (n > 2) {
      values(1) = values(0);  // a repeated eigenvalue has no vectors of its own, but still a pair of them
    }
    const TypeParam a = this->with_spectrum(this->random_basis(random, n), values);
    const auto pairs = this->solve(a);
    ASSERT_EQ(pairs.vectors.rows(), n);
    ASSERT_EQ(pairs.vectors.cols(), n);
    EXPECT_LE((pairs.values - values).norm(), noise(n) * 3);
    const TypeParam residual = a * pairs.vectors - pairs.vectors * pairs.values.asDiagonal();
    EXPECT_LE(residual.norm(), noise(n) * a.norm()) << n;
    const TypeParam gram = pairs.vectors.adjoint() * pairs.vectors;
    EXPECT_LE((gram - TypeParam::Identity(n, n)).norm(), noise(n)) << n;
  }
}

TYPED_TEST(Eigenproblem, TopPairsAreThoseOfTheWholeProblem) {
  Random random(2);
  const Index n = 23;
  const TypeParam root = this->random_matrix(random, n, n + 4);
  const TypeParam a = root * root.adjoint();
  const auto all = this->solve(a);
  for (Index i = 1; i < n; ++i) {
    EXPECT_GE(all.values(i - 1), all.values(i));
  }
  for (const Index k : {1, 4, 22, 23}) {
    const auto top = this->solve(a, k);
    ASSERT_EQ(top.values.size(), k);
    ASSERT_EQ(top.vectors.cols(), k);
    EXPECT_LE((top.values - all.values.head(k)).norm(), noise(n) * a.norm());
    for (Index i = 0; i < k; ++i) {
      const double above = i > 0 ? all.values(i - 1) - all.values(i) : kInfinity;
      const double below = i + 1 < n ? all.values(i) - all.values(i + 1) : kInfinity;
      // A vector is known as well as its eigenvalue is apart from the others.
      EXPECT_LE((top.vectors.col(i) - all.vectors.col(i)).norm(),
                noise(n) * a.norm() / std::min(above, below))
          << k << " " << i;
    }
  }
}

TYPED_TEST(Eigenproblem, LargestEntryIsRealAndPositive) {
  Random random(3);
  const TypeParam a =
      this->with_spectrum(this->random_basis(random, 12), VectorD::LinSpaced(12, 1, 12).reverse());
  const auto pairs = this->solve(a);
  for (Index j = 0; j < 12; ++j) {
    Index at = 0;
    pairs.vectors.col(j).cwiseAbs().maxCoeff(&at);
    EXPECT_GT(std::real(pairs.vectors(at, j)), 0) << j;
    EXPECT_LE(std::abs(std::imag(pairs.vectors(at, j))), kEpsilon) << j;
  }
  EXPECT_TRUE(this->solve(a).vectors == pairs.vectors);
  // Nothing that LAPACK could choose is left: other signs or phases of the same vectors give the same pairs.
  TypeParam turned = pairs.vectors;
  for (Index j = 0; j < 12; ++j) {
    if constexpr (TestFixture::is_complex) {
      turned.col(j) *= std::polar(1.0, 0.7 * static_cast<double>(j));
    } else {
      turned.col(j) *= j % 2 == 0 ? -1 : 1;
    }
  }
  const auto again = this->solve(this->with_spectrum(turned, pairs.values));
  EXPECT_LE((again.vectors - pairs.vectors).norm(), noise(12) * a.norm());
}

TYPED_TEST(Eigenproblem, FirstOfEqualEntriesDecides) {
  TypeParam swap = TypeParam::Zero(2, 2);
  swap(0, 1) = swap(1, 0) = 1;
  const auto pairs = this->solve(swap);
  TypeParam expected(2, 2);
  expected << 1, 1, 1, -1;
  EXPECT_LE((pairs.vectors - expected / std::sqrt(2.0)).norm(), noise(2));
  if constexpr (TestFixture::is_complex) {
    // [[0, i], [-i, 0]] (1, -i) = (1, -i)
    TypeParam a = TypeParam::Zero(2, 2);
    a(0, 1) = {0, 1};
    a(1, 0) = {0, -1};
    const auto turned = this->solve(a);
    expected << 1, 1, std::complex<double>(0, -1), std::complex<double>(0, 1);
    EXPECT_LE((turned.vectors - expected / std::sqrt(2.0)).norm(), noise(2));
  }
}

TYPED_TEST(Eigenproblem, ReadsTheLowerTriangleOnly) {
  Random random(4);
  const TypeParam root = this->random_matrix(random, 7, 7);
  const TypeParam a = root * root.adjoint();
  TypeParam other = a;
  other.template triangularView<Eigen::StrictlyUpper>().setConstant(99);
  EXPECT_TRUE(this->solve(other).vectors == this->solve(a).vectors);
  EXPECT_TRUE(this->solve(other, 3).values == this->solve(a, 3).values);
}

TYPED_TEST(Eigenproblem, Refusals) {
  EXPECT_THROW(this->solve(TypeParam::Zero(3, 4)), std::invalid_argument);
  EXPECT_THROW(this->solve(TypeParam::Identity(3, 3), 4), std::invalid_argument);
  EXPECT_THROW(this->solve(TypeParam::Identity(3, 3), -1), std::invalid_argument);
  EXPECT_EQ(this->solve(TypeParam(0, 0)).values.size(), 0);
  // None asked for is none, not all.
  EXPECT_EQ(this->solve(TypeParam::Identity(3, 3), 0).values.size(), 0);
  EXPECT_EQ(this->solve(TypeParam::Identity(3, 3), 0).vectors.rows(), 3);
  EXPECT_EQ(this->solve(TypeParam::Identity(3, 3), 0).vectors.cols(), 0);
  for (const double bad : {kNan, kInfinity, -kInfinity}) {
    TypeParam a = TypeParam::Identity(3, 3);
    a(2, 1) = bad;
    try {
      this->solve(a);
      ADD_FAILURE() << bad << " was taken";
    } catch (const NumericalError& error) {
      EXPECT_NE(std::string(error.what()).find(TestFixture::routine), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("3 x 3"), std::string::npos) << error.what();
    }
  }
}

MatrixD random_semidefinite(Random& random, Index n, Index rank) {
  const MatrixD root = random.matrix_d(n, rank);
  return root * root.transpose();
}

TEST(SymmetricRoot, SquaresBack) {
  Random random(5);
  const Index n = 9;
  const MatrixD a = random_semidefinite(random, n, 2 * n);
  const SymmetricRoot half = symmetric_root(a, 1e-12);
  EXPECT_LE(relative_error(half.root * half.root, a), noise(n));
  EXPECT_LE((half.root - half.root.transpose()).norm(), noise(n) * half.root.norm());
  // The inverse is as exact as the root is well conditioned.
  const double condition = half.root.norm() * half.inverse.norm();
  EXPECT_LE((half.root * half.inverse - MatrixD::Identity(n, n)).norm(), noise(n) * condition);
  EXPECT_GT(symmetric_eigenpairs(half.root).values.minCoeff(), 0);
}

TEST(SymmetricRoot, RaisesSmallEigenvaluesToTheFloor) {
  // diag(4, 1, 0.001, 0) and a rounding error below zero, in another basis.
  Random random(6);
  const MatrixD q = MatrixD(Eigen::HouseholderQR<MatrixD>(random.matrix_d(5, 5)).householderQ());
  VectorD values(5);
  values << 4, 1, 0.001, 0, -1e-17;
  const SymmetricRoot half = symmetric_root(q * values.asDiagonal() * q.transpose(), 1e-2);
  VectorD raised(5);
  raised << 2, 1, 0.2, 0.2, 0.2;
  EXPECT_LE(relative_error(half.root, q * raised.asDiagonal() * q.transpose()), noise(5) * 10);
  EXPECT_LE(relative_error(half.inverse, q * raised.cwiseInverse().asDiagonal() * q.transpose()),
            noise(5) * 10);
}

TEST(SymmetricRoot, ZeroGivesIdentities) {
  const SymmetricRoot half = symmetric_root(MatrixD::Zero(4, 4), 1e-8);
  EXPECT_TRUE(half.root == MatrixD::Identity(4, 4));
  EXPECT_TRUE(half.inverse == MatrixD::Identity(4, 4));
  EXPECT_EQ(symmetric_root(MatrixD(0, 0), 1e-8).root.size(), 0);
  EXPECT_THROW(symmetric_root(MatrixD::Zero(4, 3), 1e-8), std::invalid_argument);
  EXPECT_THROW(symmetric_root(MatrixD::Constant(2, 2, kNan), 1e-8), NumericalError);
}

TEST(RidgeSolve, RidgeIsInUnitsOfTheMeanDiagonal) {
  VectorD diagonal(3);
  diagonal << 1, 2, 6;
  const MatrixD x = ridge_solve(diagonal.asDiagonal(), MatrixD::Ones(3, 2), 0.5);
  VectorD expected(3);
  expected << 1 / 2.5, 1 / 3.5, 1 / 7.5;
  EXPECT_LE((x.col(0) - expected).norm(), 4 * kEpsilon);
  EXPECT_TRUE(x.col(0) == x.col(1));
}

TEST(RidgeSolve, SolvesSeveralSystemsAtOnce) {
  Random random(7);
  const Index n = 11;
  // Rank 6: without the ridge there is no solution.
  const MatrixD a = random_semidefinite(random, n, 6);
  const MatrixD b = random.matrix_d(n, 3);
  for (const double ridge : {1e-3, 0.1, 10.0}) {
    const MatrixD x = ridge_solve(a, b, ridge);
    const MatrixD regular = a + ridge * a.trace() / static_cast<double>(n) * MatrixD::Identity(n, n);
    ASSERT_EQ(x.rows(), n);
    ASSERT_EQ(x.cols(), 3);
    EXPECT_LE((regular * x - b).norm(), noise(n) * regular.norm() * x.norm()) << ridge;
  }
}

TEST(PositiveInverse, OfASingularMatrixIsThePseudoInverse) {
  Random random(8);
  const MatrixD a = random_semidefinite(random, 9, 4);
  const MatrixD inverse = positive_inverse(a);
  EXPECT_LE(relative_error(MatrixD(a * inverse * a), a), 1e-9);
  EXPECT_LE(relative_error(MatrixD(inverse * a * inverse), inverse), 1e-9);
  // What sums in float32 leave of a rank-deficient matrix is slightly indefinite.
  MatrixD rounded = a;
  rounded(0, 0) -= 1e-6 * a.norm();
  EXPECT_TRUE(positive_inverse(rounded).allFinite());
  EXPECT_TRUE(positive_inverse(MatrixD::Zero(3, 3)).isZero(0));
  EXPECT_THROW(positive_inverse(-MatrixD::Identity(2, 2)), NumericalError);
  EXPECT_THROW(positive_inverse(MatrixD::Constant(2, 2, kNan)), NumericalError);
}

TEST(RidgeSolve, Refusals) {
  MatrixD singular = MatrixD::Zero(2, 2);
  singular(0, 0) = 1;
  // Without a ridge the direction that nothing is known of stays at rest.
  const MatrixD rest = ridge_solve(singular, MatrixD::Ones(2, 1), 0);
  EXPECT_NEAR(rest(0, 0), 1, 1e-12);
  EXPECT_NEAR(rest(1, 0), 0, 1e-12);
  EXPECT_TRUE(ridge_solve(MatrixD::Zero(2, 2), MatrixD::Ones(2, 1), 0.1).isZero(0));
  EXPECT_NO_THROW(ridge_solve(singular, MatrixD::Ones(2, 1), 1e-6));
  EXPECT_THROW(ridge_solve(-MatrixD::Identity(2, 2), MatrixD::Ones(2, 1), 0.1), NumericalError);
  EXPECT_THROW(ridge_solve(MatrixD::Identity(2, 2), MatrixD::Ones(3, 1), 0.1), std::invalid_argument);
  EXPECT_THROW(ridge_solve(MatrixD::Ones(2, 3), MatrixD::Ones(2, 1), 0.1), std::invalid_argument);
  EXPECT_THROW(ridge_solve(MatrixD::Constant(2, 2, kNan), MatrixD::Ones(2, 1), 0.1), NumericalError);
  EXPECT_THROW(ridge_solve(MatrixD::Identity(2, 2), MatrixD::Constant(2, 1, kNan), 0.1), NumericalError);
  EXPECT_EQ(ridge_solve(MatrixD::Identity(2, 2), MatrixD(2, 0), 0.1).cols(), 0);
}

}  // namespace
}  // namespace relatent
