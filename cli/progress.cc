#include "cli/progress.h"

#include <sys/resource.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <utility>

namespace relatent {
namespace {

constexpr std::chrono::seconds log_interval{5};

}  // namespace

Progress::Progress(std::string what, bool quiet, std::string unit)
    : what_(std::move(what)),
      unit_(std::move(unit)),
      quiet_(quiet),
      terminal_(isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()),
      last_(start_) {}

Progress::~Progress() {
  if (open_line_) {
    std::fputc('\n', stderr);
  }
}

void Progress::operator()(Index done, Index total) {
  if (quiet_) {
    return;
  }
  const auto now = std::chrono::steady_clock::now();
  if (before_ < 0) {
    before_ = done - 1;
  }
  if (!terminal_ && done < total && now - last_ < log_interval) {
    return;
  }
  last_ = now;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double left = seconds / static_cast<double>(done - before_) * static_cast<double>(total - done);
  std::fprintf(stderr, "%s%s: %s %td of %td, %.1f s, about %.0f s left%s", terminal_ ? "\r\033[K" : "",
               what_.c_str(), unit_.c_str(), done, total, seconds, left, terminal_ ? "" : "\n");
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
