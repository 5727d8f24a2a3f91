// What people see while they wait and how numbers are printed. Everything here goes to stderr; stdout is for
// results.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "linalg/matrix.h"

namespace relatent {

// "32K", of a multiple of 1024.
std::string context_text(Index tokens);

// What a whole piece of work goes through, for rates, as far as it is known.
struct WorkAmount {
  std::optional<double> tokens{};
  std::optional<double> bytes{};
};

// One line on a terminal that is brought up to date every second, a line every few seconds in a log, however
// long a unit takes.
class Progress {
 public:
  // "WHAT: UNIT 3 of 12, 5120 tokens/s, 1.2 of 4.8 GB, 10.1 s, about 30 s left"
  Progress(std::string what, bool quiet, std::string unit = "layer", WorkAmount amount = {});
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  // Units done of all. Called from one thread.
  void operator()(Index done, Index total);

 private:
  using Clock = std::chrono::steady_clock;
  void refresh();
  void print(Clock::time_point now);

  std::string what_;
  std::string unit_;
  WorkAmount amount_;
  bool terminal_;
  Clock::time_point start_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable ended_;
  bool over_ = false;
  bool open_line_ = false;
  Index done_ = 0;
  Index total_ = 0;
  std::optional<Index> before_;  // units that an earlier run did; none before the first of this one
  Clock::time_point reached_;    // when `done_` units were done
  std::thread refresher_;
};

// "1.3 GB", decimal units.
std::string bytes_text(std::uint64_t bytes);
// printf with one number.
std::string number_text(const char* format, double value);
// The most memory this process has held so far, in bytes.
std::uint64_t peak_rss_bytes();

}  // namespace relatent
