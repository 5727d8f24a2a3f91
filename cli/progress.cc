#include "cli/progress.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

namespace relatent {
namespace {

constexpr std::chrono::seconds log_interval{5};
constexpr std::chrono::seconds terminal_interval{1};

}  // namespace

std::string context_text(Index tokens) {
  return std::to_string(tokens / 1024) + "K";
}

Progress::Progress(std::string what, bool quiet, std::string unit, WorkAmount amount)
    : what_(std::move(what)),
      unit_(std::move(unit)),
      amount_(amount),
      terminal_(isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      reached_(start_) {
  if (!quiet) {
    refresher_ = std::thread([this] { refresh(); });
  }
}

Progress::~Progress() {
  if (!refresher_.joinable()) {
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
  }
  ended_.notify_one();
  refresher_.join();
  if (open_line_) {
    std::fputc('\n', stderr);
  }
}

void Progress::refresh() {
  std::unique_lock lock(mutex_);
  while (!ended_.wait_for(lock, terminal_ ? terminal_interval : log_interval, [this] { return over_; })) {
    print(Clock::now());
  }
}

void Progress::operator()(Index done, Index total) {
  if (!refresher_.joinable()) {
    return;
  }
  const std::lock_guard lock(mutex_);
  if (!before_) {
    before_ = done - 1;
  }
  done_ = done;
  total_ = total;
  reached_ = Clock::now();
  if (terminal_ || done == total) {
    print(reached_);
  }
}

void Progress::print(Clock::time_point now) {
  if (total_ == 0) {
    return;
  }
  const auto since_start = [this](Clock::time_point time) {
    return std::chrono::duration<double>(time - start_).count();
  };
  const double part = static_cast<double>(done_) / static_cast<double>(total_);
  const double reached = since_start(reached_);
  const double seconds = since_start(now);
  std::string line = what_ + ": " + unit_ + " " + std::to_string(done_) + " of " + std::to_string(total_);
  const double here = static_cast<double>(done_ - before_.value_or(0)) / static_cast<double>(total_);
  if (amount_.tokens && reached > 0) {
    line += number_text(", %.0f tokens/s", *amount_.tokens * here / reached);
  }
  if (amount_.bytes) {
    line += ", " + bytes_text(static_cast<std::uint64_t>(*amount_.bytes * part)) + " of " +
            bytes_text(static_cast<std::uint64_t>(*amount_.bytes));
  }
  line += number_text(", %.1f s", seconds);
  if (done_ > 0) {
    line +=
        number_text(", about %.0f s left", std::max(0.0, reached + reached / here * (1 - part) - seconds));
  }
  std::fprintf(stderr, "%s%s%s", terminal_ ? "\r\033[K" : "", line.c_str(), terminal_ ? "" : "\n");
  std::fflush(stderr);
  open_line_ = terminal_;
}

std::string bytes_text(std::uint64_t bytes) {
  constexpr std::array<const char*, 5> units = {"B", "kB", "MB", "GB", "TB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1000 && unit + 1 < units.size()) {
    value /= 1000;
    ++unit;
  }
  return number_text(unit == 0 ? "%.0f " : "%.3g ", value) + units.at(unit);
}

std::string number_text(const char* format, double value) {
  std::array<char, 64> out{};
  std::snprintf(out.data(), out.size(), format, value);
  return out.data();
}

std::uint64_t peak_rss_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace relatent
