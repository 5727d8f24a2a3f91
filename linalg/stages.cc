#include "linalg/stages.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string_view>
#include <utility>

namespace relatent {
namespace {

using Clock = std::chrono::steady_clock;

struct Total {
  Clock::duration time{};
  std::uint64_t times = 0;
};

struct Totals {
  std::mutex guard;
  std::map<std::string_view, Total> by_name;
};

Totals& totals() {
  static Totals all;
  return all;
}

thread_local Stage* t_innermost = nullptr;

}  // namespace

Stage::Stage(const char* name) : name_(name), outer_(t_innermost), resumed_(Clock::now()) {
  if (outer_ != nullptr) {
    outer_->own_ += resumed_ - outer_->resumed_;
  }
  t_innermost = this;
}

Stage::~Stage() {
  const Clock::time_point now = Clock::now();
  own_ += now - resumed_;
  t_innermost = outer_;
  if (outer_ != nullptr) {
    outer_->resumed_ = now;
  }
  Totals& all = totals();
  const std::scoped_lock lock(all.guard);
  Total& total = all.by_name[name_];
  total.time += own_;
  ++total.times;
}

const char* Stage::current() {
  return t_innermost != nullptr ? t_innermost->name_ : nullptr;
}

std::string Stage::path() {
  std::string out;
  for (const Stage* stage = t_innermost; stage != nullptr; stage = stage->outer_) {
    out.insert(0, out.empty() ? "" : ", ");
    out.insert(0, stage->name_);
  }
  return out;
}

std::vector<StageTime> stage_times() {
  std::vector<StageTime> out;
  {
    Totals& all = totals();
    const std::scoped_lock lock(all.guard);
    for (const auto& [name, total] : all.by_name) {
      out.push_back({std::string(name), std::chrono::duration<double>(total.time).count(), total.times});
    }
  }
  std::stable_sort(out.begin(), out.end(), [](const StageTime& a, const StageTime& b) {
    return a.thread_seconds > b.thread_seconds;
  });
  return out;
}

}  // namespace relatent
