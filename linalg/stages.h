// Where the time of a run goes.
//
// A Stage takes the time of its thread from its construction to its end, less that of the stages opened
// inside of it, so that no second counts twice. Threads that parallel_for starts work for the stage of the
// thread that called it. Times are therefore seconds of threads: on n threads they add up to at most n times
// the time of the run. Totals are the process's.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace relatent {

class Stage {
 public:
  // name: a literal, a few words.
  explicit Stage(const char* name);
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;
  ~Stage();
  // The innermost stage of this thread; null outside of all.
  static const char* current();
  // All of this thread's stages, from the outermost: "fit queries, solves". Empty outside of all.
  static std::string path();

 private:
  const char* name_;
  Stage* outer_;
  std::chrono::steady_clock::time_point resumed_;
  std::chrono::steady_clock::duration own_{};
};

struct StageTime {
  std::string name;
  double thread_seconds = 0;
  std::uint64_t times = 0;  // how often the stage was entered
};
// Of the stages that have ended, longest first; equal ones by name.
std::vector<StageTime> stage_times();

}  // namespace relatent
