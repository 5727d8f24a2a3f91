// What runs that can be continued have in common: what decides their result, and when to make progress
// durable.
#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <string>

#include "formats/checkpoint.h"
#include "formats/journal.h"

namespace relatent {

// The shortest text that gives the number back.
std::string exact_text(double number);

// How a run deals with being interrupted.
struct SaveOptions {
  // Go on with what an unfinished run left, if it did.
  bool resume = false;
  // Seconds of work that may be lost, about; 0 = save after every layer. Saving never takes more than a tenth
  // of the time.
  double every = 30;
  // Called when an unfinished run is taken up, before anything is computed.
  std::function<void()> taken_up = {};
};

// The program's version.
RunIdentity program_identity();
// Every file of the source that reaches the result: its shards (with a checksum of their headers), index,
// config (with a checksum) and side files. Throws Error (input) when one that was read changed since.
void add_source_identity(const Checkpoint& source, RunIdentity& facts);
// Throws Error (input) when a file that both name is not as it was: what was read of it may be of two minds.
void require_unchanged(const RunIdentity& before, const RunIdentity& now);

// Says when it is time to save.
class SaveClock {
 public:
  explicit SaveClock(double every) : every_(every), last_(Clock::now()) {}
  bool due() const;
  // Runs and times a save.
  template <typename Save>
  void save(Save&& work) {
    const Clock::time_point start = Clock::now();
    work();
    last_ = Clock::now();
    took_ = last_ - start;
  }

 private:
  using Clock = std::chrono::steady_clock;
  double every_;
  Clock::time_point last_;
  Clock::duration took_{};
};

}  // namespace relatent
