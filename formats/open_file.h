// Opening files, for the code that maps, reads and writes them.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>

namespace relatent {

// A descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) {
      ::close(fd_);
    }
  }
  int get() const { return fd_; }
  // Leaves the closing to the caller.
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

// "FILE: PROBLEM: <text of error_number>", kind machine.
[[noreturn]] void fail_machine(const std::filesystem::path& file, const std::string& problem,
                               int error_number);

// "a folder", "a pipe", "a symbolic link", ... for the mode of anything but a regular file.
std::string kind_of_file(mode_t mode);

struct OpenFile {
  Descriptor descriptor;
  std::uint64_t size = 0;
};

// Opens for reading. Throws Error (input when there is no such file or it is no regular file, machine
// otherwise).
OpenFile open_regular(const std::filesystem::path& path);

}  // namespace relatent
