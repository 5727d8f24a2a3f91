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

// 600 columns are more than two tiles, 1100 rows more than two panels.
TEST(ActivationMoments, SecondMomentFillsTheLowerTriangle) {
  struct Case {
    Index rows;
    Index size;
  };
  for (const Case& test :
       {Case{9, 1}, Case{9, 5}, Case{9, 256}, Case{9, 257}, Case{9, 600}, Case{1100, 40}, Case{1100, 300}}) {
    Random random(1);
    const Index size = test.size;
    const MatrixF x = random.matrix(test.rows, size);
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
    Index rows;
    Index left;
    Index right;
  };
  for (const Case& size : {Case{9, 3, 5}, Case{9, 300, 7}, Case{9, 7, 520}, Case{1100, 300, 40}}) {
    Random random(2);
    const MatrixF y = random.matrix(size.rows, size.left);
    const MatrixF x = random.matrix(size.rows, size.right);
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
