#include "linalg/stages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "linalg/threads.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::ThreadCount;
using namespace std::chrono_literals;

StageTime time_of(const std::string& name) {
  const std::vector<StageTime> all = stage_times();
  const auto found = std::find_if(all.begin(), all.end(), [&](const StageTime& t) { return t.name == name; });
  return found == all.end() ? StageTime{name, 0, 0} : *found;
}

TEST(Stages, NoSecondCountsTwice) {
  EXPECT_EQ(Stage::current(), nullptr);
  const auto start = std::chrono::steady_clock::now();
  {
    const Stage outer("test outer");
    std::this_thread::sleep_for(20ms);
    for (int i = 0; i < 2; ++i) {
      const Stage inner("test inner");
      EXPECT_STREQ(Stage::current(), "test inner");
      std::this_thread::sleep_for(40ms);
    }
    EXPECT_STREQ(Stage::current(), "test outer");
  }
  const double all = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EXPECT_EQ(Stage::current(), nullptr);
  const StageTime outer = time_of("test outer");
  const StageTime inner = time_of("test inner");
  EXPECT_EQ(outer.times, 1U);
  EXPECT_EQ(inner.times, 2U);
  EXPECT_GE(outer.thread_seconds, 0.02);
  EXPECT_GE(inner.thread_seconds, 0.08);
  EXPECT_LE(outer.thread_seconds + inner.thread_seconds, all);
}

TEST(Stages, StartedThreadsWorkForTheCallersStage) {
  const ThreadCount threads(3);
  {
    const Stage stage("test threads");
    parallel_for(3, [](std::size_t i) {
      EXPECT_STREQ(Stage::current(), "test threads");
      if (i == 1) {
        const Stage inner("test part");
      }
      std::this_thread::sleep_for(30ms);
    });
  }
  EXPECT_GE(time_of("test threads").thread_seconds, 0.09);
  EXPECT_EQ(time_of("test threads").times, 3U);
  EXPECT_EQ(time_of("test part").times, 1U);
}

TEST(Stages, OutsideOfAllStagesNothingIsCounted) {
  const auto count = [] {
    std::uint64_t all = 0;
    for (const StageTime& stage : stage_times()) {
      all += stage.times;
    }
    return all;
  };
  const std::uint64_t before = count();
  const ThreadCount threads(2);
  parallel_for(2, [](std::size_t) { EXPECT_EQ(Stage::current(), nullptr); });
  EXPECT_EQ(count(), before);
}

TEST(Stages, LongestFirst) {
  { const Stage brief("test brief"); }
  {
    const Stage longer("test longer");
    std::this_thread::sleep_for(20ms);
  }
  const std::vector<StageTime> all = stage_times();
  EXPECT_TRUE(std::is_sorted(all.begin(), all.end(), [](const StageTime& a, const StageTime& b) {
    return a.thread_seconds > b.thread_seconds;
  }));
}

}  // namespace
}  // namespace relatent
