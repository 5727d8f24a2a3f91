#include "linalg/heap.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "linalg/matrix.h"

namespace relatent {
namespace {

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

long faults() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt;
}

long resident_kilobytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word == "RssAnon:") {
      long out = 0;
      status >> out;
      return out;
    }
  }
  return -1;
}

constexpr Index numbers = Index{8} << 20U;  // 32 MiB, 8192 pages

// 0 when all is as it should be. The heap of the test program stays as it is.
int check_heap() {
  keep_freed_memory();
  const long before = faults();
  float sum = 0;
  for (int i = 0; i < 10; ++i) {
    const VectorF values = VectorF::Constant(numbers, static_cast<float>(i));
    sum += values(numbers / 2);
  }
  if (sum != 45) {
    return 1;
  }
  if (faults() - before > 2L * 8192) {
    return 2;
  }
  const long held = resident_kilobytes();
  return_freed_memory();
  return held - resident_kilobytes() > 24L * 1024 ? 0 : 3;
}

TEST(HeapDeathTest, KeepsAndReturnsWhatWasFreed) {
  EXPECT_EXIT(std::exit(check_heap()), ::testing::ExitedWithCode(0), "");
}

#endif

}  // namespace
}  // namespace relatent
