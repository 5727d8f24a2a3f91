#include "linalg/moments.h"

#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>

#include "tests/support/samples.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::Random;
using testing_support::relative_error;
using testing_support::ThreadCount;

// A few dozen products per entry.
constexpr double kNoise = 64 * std::numeric_limits<double>::epsilon();

// 600 columns are more than two tiles.
TEST(ActivationMoments, SecondMomentFillsTheLowerTriangle) {
  for (const Index size : {1, 5, 256, 257, 600}) {
    Random random(1);
    const MatrixF x = random.matrix(9, size);
    const auto sum = [&](int threads) {
      const ThreadCount count(threads);
      MatrixD out = MatrixD::Constant(size, size, 3);
      add_second_moment(x, out);
      return out;
    };
    const MatrixD found = sum(1);
    EXPECT_TRUE(sum(3) == found) << size;
    const MatrixD wide = x.cast<double>();
    const MatrixD expected = (wide.transpose() * wide).array() + 3;
    const MatrixD lower = found.triangularView<Eigen::Lower>();
    EXPECT_LE(relative_error(lower, MatrixD(expected.triangularView<Eigen::Lower>())), kNoise) << size;
    MatrixD whole = found;
    mirror_lower(whole);
    EXPECT_TRUE(whole == whole.transpose());
    EXPECT_LE(relative_error(whole, expected), kNoise) << size;
  }
  MatrixD other = MatrixD::Zero(4, 5);
  EXPECT_THROW(add_second_moment(MatrixF::Zero(3, 5), other), std::invalid_argument);
}

TEST(ActivationMoments, CrossMomentIsTheSumOfOuterProducts) {
  struct Case {
    Index left;
    Index right;
  };
  for (const Case& size : {Case{3, 5}, Case{300, 7}, Case{7, 520}}) {
    Random random(2);
    const MatrixF y = random.matrix(9, size.left);
    const MatrixF x = random.matrix(9, size.right);
    const auto sum = [&](int threads) {
      const ThreadCount count(threads);
      MatrixD out = MatrixD::Constant(size.left, size.right, 3);
      add_cross_moment(y, x, out);
      return out;
    };
    const MatrixD found = sum(1);
    EXPECT_TRUE(sum(3) == found);
    const MatrixD expected = (y.cast<double>().transpose() * x.cast<double>()).array() + 3;
    EXPECT_LE(relative_error(found, expected), kNoise);
  }
  MatrixD sum = MatrixD::Zero(2, 3);
  EXPECT_THROW(add_cross_moment(MatrixF::Zero(4, 2), MatrixF::Zero(5, 3), sum), std::invalid_argument);
  EXPECT_THROW(add_cross_moment(MatrixF::Zero(4, 3), MatrixF::Zero(4, 2), sum), std::invalid_argument);
}

}  // namespace
}  // namespace relatent
