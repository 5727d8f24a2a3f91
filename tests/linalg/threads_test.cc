#include "linalg/threads.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "linalg/decompose.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::ThreadCount;

// Whether `wanted` pieces can be under way at the same moment: each waits until all have begun.
bool run_together(std::size_t wanted) {
  std::atomic<std::size_t> begun{0};
  std::atomic<bool> all{true};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  parallel_for(wanted, [&](std::size_t) {
    ++begun;
    while (begun < wanted) {
      if (std::chrono::steady_clock::now() > deadline) {
        all = false;
        return;
      }
      std::this_thread::yield();
    }
  });
  return all;
}

TEST(Threads, CountIsWhatWasSet) {
  const ThreadCount restored(3);
  EXPECT_EQ(num_threads(), 3);
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  set_num_threads(0);
  EXPECT_EQ(num_threads(), cores);
  set_num_threads(-4);
  EXPECT_EQ(num_threads(), cores);
}

TEST(Threads, EveryPieceRunsOnce) {
  for (const int threads : {1, 2, 7}) {
    const ThreadCount count(threads);
    for (const std::size_t pieces : {0U, 1U, 3U, 1000U}) {
      std::vector<std::atomic<int>> runs(pieces);
      std::mutex guard;
      std::set<std::thread::id> seen;
      parallel_for(pieces, [&](std::size_t i) {
        ++runs.at(i);
        const std::scoped_lock lock(guard);
        seen.insert(std::this_thread::get_id());
      });
      EXPECT_TRUE(std::all_of(runs.begin(), runs.end(), [](const auto& n) { return n == 1; }))
          << threads << " threads, " << pieces << " pieces";
      EXPECT_LE(seen.size(), static_cast<std::size_t>(threads));
    }
  }
}

TEST(Threads, PiecesRunAtTheSameTime) {
  const ThreadCount count(3);
  EXPECT_TRUE(run_together(3));
}

TEST(Threads, ExceptionReachesTheCaller) {
  for (const int threads : {1, 2, 5}) {
    const ThreadCount count(threads);
    const auto thrown_by = [](std::size_t first_bad) -> std::string {
      try {
        parallel_for(40, [&](std::size_t i) {
          if (i >= first_bad) {
            throw std::domain_error("piece failed");
          }
        });
      } catch (const std::domain_error& error) {
        return error.what();
      }
      return "";
    };
    EXPECT_EQ(thrown_by(0), "piece failed") << threads;
    EXPECT_EQ(thrown_by(39), "piece failed") << threads;
    EXPECT_EQ(thrown_by(40), "") << threads;
    // Threads are not lost to a failure.
    EXPECT_TRUE(run_together(static_cast<std::size_t>(threads)));
  }
}

TEST(Threads, PiecesAfterAFailureAreSkipped) {
  for (const int threads : {1, 3}) {
    const ThreadCount count(threads);
    std::atomic<int> runs{0};
    EXPECT_THROW(parallel_for(200,
                              [&](std::size_t i) {
                                if (i == 5) {
                                  throw std::domain_error("piece failed");
                                }
                                ++runs;
                                // Long against the time that the failure takes to be known.
                                std::this_thread::sleep_for(std::chrono::milliseconds(1));
                              }),
                 std::domain_error);
    EXPECT_GE(runs, 5) << threads;
    EXPECT_LT(runs, 199) << threads;
    if (threads == 1) {
      EXPECT_EQ(runs, 5);
    }
  }
}

TEST(Threads, NestedCallsRunSerially) {
  const ThreadCount count(4);
  for (const std::size_t outer : {1U, 2U, 9U}) {
    std::atomic<int> foreign{0};
    std::atomic<int> unordered{0};
    std::atomic<int> runs{0};
    parallel_for(outer, [&](std::size_t) {
      const std::thread::id here = std::this_thread::get_id();
      std::size_t next = 0;
      std::mutex guard;
      parallel_for(50, [&](std::size_t i) {
        if (i == 0) {
          // Time for other threads to take pieces, were there any.
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        const std::scoped_lock lock(guard);
        foreign += std::this_thread::get_id() == here ? 0 : 1;
        unordered += i == next++ ? 0 : 1;
        ++runs;
      });
    });
    EXPECT_EQ(foreign, 0) << outer << " outer pieces";
    EXPECT_EQ(unordered, 0) << outer << " outer pieces";
    EXPECT_EQ(runs, static_cast<int>(outer) * 50);
  }
  EXPECT_TRUE(run_together(4));
}

// Large enough for OpenBLAS to use threads of its own if it were allowed to.
TEST(Threads, ResultsDoNotDependOnTheCount) {
  const MatrixD a = MatrixD::NullaryExpr(190, 190, [](Index i, Index j) {
    return 1.0 / static_cast<double>(1 + i + j) + (i == j ? 0.01 * static_cast<double>(i) : 0.0);
  });
  const auto compute = [&](int threads) {
    const ThreadCount count(threads);
    std::vector<MatrixD> out(5);
    parallel_for(
        4, [&](std::size_t i) { out[i] = symmetric_eigenpairs(a, static_cast<Index>(10 + i)).vectors; });
    out[4] = symmetric_eigenpairs(a).vectors * a;
    return out;
  };
  const std::vector<MatrixD> one = compute(1);
  for (const int threads : {2, 5}) {
    EXPECT_TRUE(compute(threads) == one) << threads;
  }
}

// Leaves so many bytes of address space beyond what the process has.
void leave_address_space(std::size_t bytes) {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  const std::size_t limit = pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)) + bytes;
  const rlimit both{limit, limit};
  ASSERT_EQ(::setrlimit(RLIMIT_AS, &both), 0);
}

TEST(BlasMemory, IsEnoughWithoutALimit) {
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_AS, &limit), 0);
  if (limit.rlim_cur == RLIM_INFINITY) {
    EXPECT_EQ(why_blas_would_hang(100'000), "");
  }
}

TEST(BlasMemoryDeathTest, TooLittleIsNoticedBeforeItIsNeeded) {
  const auto say = [] {
    leave_address_space(std::size_t{300} << 20U);
    std::fputs(why_blas_would_hang(3).c_str(), stderr);
    // Asking takes nothing, so that there is room the second time too.
    const bool room = why_blas_would_hang(2).empty() && why_blas_would_hang(2).empty();
    std::_Exit(room ? 0 : 1);
  };
  EXPECT_EXIT(say(), testing::ExitedWithCode(0), "ulimit -v.*128 MiB for each of 3 threads");
}

TEST(BlasMemoryDeathTest, EnoughIsKeptForTheThreads) {
  const auto multiply = [] {
    ::alarm(60);
    leave_address_space(std::size_t{600} << 20U);
    if (!why_blas_would_hang(2).empty()) {
      std::_Exit(1);
    }
    take_blas_buffers(2);
    // Nothing is left but what small matrices and a thread take.
    leave_address_space(std::size_t{100} << 20U);
    const ThreadCount threads(2);
    parallel_for(2, [](std::size_t) {
      const MatrixF a = MatrixF::Ones(300, 300);
      const MatrixF b = a * a;
      if (b(0, 0) != 300) {
        std::_Exit(2);
      }
    });
    std::_Exit(0);
  };
  EXPECT_EXIT(multiply(), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace relatent
