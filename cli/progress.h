// What people see while they wait and how numbers are printed. Everything here goes to stderr; stdout is for
// results.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "linalg/matrix.h"

namespace relatent {

// One updating line on a terminal, a line every few seconds in a log.
class Progress {
 public:
  // "WHAT: UNIT 3 of 12 ..."
  Progress(std::string what, bool quiet, std::string unit = "layer");
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  // Units done of all.
  void operator()(Index done, Index total);

 private:
  std::string what_;
  std::string unit_;
  bool quiet_;
  bool terminal_;
  bool open_line_ = false;
  Index before_ = -1;  // units that an earlier run did
  std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point last_;
};

// "1.3 GB", decimal units.
std::string bytes_text(std::uint64_t bytes);
// printf with one number.
std::string number_text(const char* format, double value);
// The most memory this process has held so far, in bytes.
std::uint64_t peak_rss_bytes();

}  // namespace relatent
