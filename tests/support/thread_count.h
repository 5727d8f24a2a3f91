// A number of threads for the length of a scope.
#pragma once

#include "linalg/threads.h"

namespace relatent::testing_support {

class ThreadCount {
 public:
  explicit ThreadCount(int threads) { set_num_threads(threads); }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;
  ~ThreadCount() { set_num_threads(0); }
};

}  // namespace relatent::testing_support
