#include "convert/in_flight.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::ThreadCount;

TEST(InFlight, AsManyAsThreadsAndMemoryAllow) {
  const ThreadCount threads(3);
  EXPECT_EQ(layers_in_flight(1), 3);
  EXPECT_EQ(layers_in_flight(0), 3);
  EXPECT_EQ(layers_in_flight(std::uint64_t{1} << 30U), 2);
  EXPECT_EQ(layers_in_flight(std::uint64_t{1} << 40U), 1);
}

TEST(InFlight, FinishesInOrderWhatItWasGiven) {
  const ThreadCount threads(3);
  std::vector<Index> asked;
  std::vector<Index> finished;
  std::vector<double> seen(7, 0);
  std::atomic<int> open{0};
  for_layers(
      2, 7, 3,
      [&](Index layer_idx) {
        asked.push_back(layer_idx);
        Moments out;
        out.diagonal = VectorD::Constant(1, static_cast<double>(layer_idx));
        return out;
      },
      [&](Index layer_idx, const Moments& moments) {
        ++open;
        seen[static_cast<std::size_t>(layer_idx)] = moments.diagonal(0);
      },
      [&](Index layer_idx) {
        EXPECT_GT(open.load(), 0);
        --open;
        finished.push_back(layer_idx);
      });
  EXPECT_EQ(asked, (std::vector<Index>{2, 3, 4, 5, 6}));
  EXPECT_EQ(finished, asked);
  EXPECT_EQ(seen, (std::vector<double>{0, 0, 2, 3, 4, 5, 6}));
}

}  // namespace
}  // namespace relatent
