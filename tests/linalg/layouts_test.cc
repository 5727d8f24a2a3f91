#include "linalg/layouts.h"

#include <gtest/gtest.h>

#include <limits>

namespace relatent {
namespace {

TEST(Layouts, CopiesEveryElement) {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {63, 65}, {130, 64}, {0, 5}}) {
    const MatrixF m = MatrixF::Random(rows, cols);
    EXPECT_TRUE(widened(m) == m.cast<double>());
    EXPECT_TRUE(narrowed(m.cast<double>()) == m);
  }
}

TEST(Layouts, FindsWhatIsNotFinite) {
  MatrixF m = MatrixF::Random(9, 17);
  m(0, 0) = std::numeric_limits<float>::max();
  m(1, 1) = std::numeric_limits<float>::denorm_min();
  EXPECT_TRUE(all_finite(m));
  EXPECT_TRUE(all_finite(MatrixF()));
  for (const float bad :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN()}) {
    MatrixF broken = m;
    broken(8, 16) = bad;
    EXPECT_FALSE(all_finite(broken));
  }
}

}  // namespace
}  // namespace relatent
