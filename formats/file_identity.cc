#include "formats/file_identity.h"

#include <sys/stat.h>

#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>

#include "formats/error.h"

namespace relatent {
namespace {

using Clock = std::chrono::system_clock;

// Twice the longest tick that Linux gives to time stamps of files (CONFIG_HZ=100).
constexpr std::chrono::milliseconds tick{20};

struct Stamp {
  std::string text;
  Clock::time_point changed;
};

Stamp stamp_of(const std::filesystem::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    fail_system(path, "cannot examine", errno);
  }
  std::string nanoseconds = std::to_string(status.st_mtim.tv_nsec);
  nanoseconds.insert(0, 9 - nanoseconds.size(), '0');
  const auto since =
      std::chrono::seconds(status.st_mtim.tv_sec) + std::chrono::nanoseconds(status.st_mtim.tv_nsec);
  return {std::to_string(status.st_size) + " bytes, changed " + std::to_string(status.st_mtim.tv_sec) + "." +
              nanoseconds,
          Clock::time_point(std::chrono::duration_cast<Clock::duration>(since))};
}

}  // namespace

std::string file_identity(const std::filesystem::path& path) {
  Stamp stamp = stamp_of(path);
  const Clock::duration age = Clock::now() - stamp.changed;
  // A time in the future is of another machine's clock, and waiting is no help.
  if (age >= Clock::duration::zero() && age < tick) {
    std::this_thread::sleep_for(tick - age);
    stamp = stamp_of(path);
  }
  return stamp.text;
}

void fail_changed(const std::string& differs) {
  throw Error(ErrorKind::input, to_sentence({.problem = "a file changed while it was read: " + differs,
                                             .next_step = "run it again when nothing writes there"}));
}

void ReadFiles::note(const std::filesystem::path& path) {
  std::error_code unreadable;  // what is wrong with it is said when it is read
  if (std::filesystem::exists(path, unreadable)) {
    identities_.insert_or_assign(path, file_identity(path));
  }
}

void ReadFiles::require_unchanged() const {
  for (const auto& [path, before] : identities_) {
    if (const std::string now = file_identity(path); now != before) {
      std::string differs = path.string();
      differs.append(" was ").append(before).append(" and is ").append(now).append(" now");
      fail_changed(differs);
    }
  }
}

}  // namespace relatent
