#include "convert/methods/layer_pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "convert/plan/memory.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::ThreadCount;

TEST(InFlight, AsManyAsThreadsAndMemoryAllow) {
  const ThreadCount threads(3);
  EXPECT_EQ(layers_at_once(1), 3);
  EXPECT_EQ(layers_at_once(0), 3);
  EXPECT_EQ(layers_at_once(std::uint64_t{3} << 29U), 2);
  EXPECT_EQ(layers_at_once(std::uint64_t{1} << 40U), 1);
}

TEST(InFlight, FinishesInOrderWhatItWasGiven) {
  for (const int threads : {1, 3}) {
    const ThreadCount count(threads);
    std::vector<Index> asked;
    std::vector<Index> finished;
    std::vector<double> seen(40, 0);
    std::atomic<int> open{0};
    std::atomic<int> most{0};
    std::atomic<int> beside{0};
    run_layer_pipeline(2, 40, 3,
                       {.moments =
                            [&](Index layer_idx) {
                              asked.push_back(layer_idx);
                              const int now = ++open;
                              most = std::max<int>(most, now);
                              Moments out;
                              out.diagonal = VectorD::Constant(1, static_cast<double>(layer_idx));
                              return out;
                            },
                        .body =
                            [&](Index layer_idx, const Moments& moments) {
                              // Layers do not become ready in their order.
                              std::this_thread::sleep_for(std::chrono::milliseconds(layer_idx % 3));
                              seen[static_cast<std::size_t>(layer_idx)] = moments.diagonal(0);
                            },
                        .finish =
                            [&](Index layer_idx) {
                              EXPECT_EQ(seen[static_cast<std::size_t>(layer_idx)],
                                        static_cast<double>(layer_idx));
                              finished.push_back(layer_idx);
                              --open;
                            },
                        .beside = [&] { ++beside; }});
    std::vector<Index> expected(38);
    std::iota(expected.begin(), expected.end(), Index{2});
    EXPECT_EQ(asked, expected);
    EXPECT_EQ(finished, expected);
    EXPECT_EQ(beside, 1);
    EXPECT_LE(most, threads == 1 ? 1 : 3);
  }
}

TEST(InFlight, LayersAreConvertedBesideTheRest) {
  const ThreadCount threads(2);
  std::atomic<int> finished{0};
  run_layer_pipeline(0, 3, 1,
                     {.moments = [](Index) { return Moments(); },
                      .body = [](Index, const Moments&) {},
                      .finish = [&](Index) { ++finished; },
                      .beside =
                          [&] {
                            // Whoever does this does not hold up the layers.
                            const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
                            while (finished < 3 && std::chrono::steady_clock::now() < deadline) {
                              std::this_thread::yield();
                            }
                            EXPECT_EQ(finished, 3);
                          }});
}

TEST(InFlight, TheFirstErrorEndsItAll) {
  for (const int threads : {1, 3}) {
    const ThreadCount count(threads);
    for (const int where : {0, 1, 2, 3}) {
      Index finished = 0;
      const auto fail_at = [&](int here, Index layer_idx) {
        if (here == where && (layer_idx == 5 || here == 3)) {
          throw std::runtime_error("here " + std::to_string(here));
        }
      };
      EXPECT_THROW(
          run_layer_pipeline(0, 1000, 3,
                             {.moments =
                                  [&](Index layer_idx) {
                                    fail_at(0, layer_idx);
                                    return Moments();
                                  },
                              .body = [&](Index layer_idx, const Moments&) { fail_at(1, layer_idx); },
                              .finish =
                                  [&](Index layer_idx) {
                                    fail_at(2, layer_idx);
                                    ++finished;
                                  },
                              .beside = [&] { fail_at(3, 0); }}),
          std::runtime_error);
      EXPECT_LE(finished, where == 3 ? 1000 : 5);
    }
  }
}

}  // namespace
}  // namespace relatent
