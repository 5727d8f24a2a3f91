#include "formats/open_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <system_error>

#include "formats/error.h"

namespace relatent {

void fail_machine(const std::filesystem::path& file, const std::string& problem, int error_number) {
  throw Error(
      ErrorKind::machine,
      to_sentence({.file = file, .problem = problem + ": " + std::generic_category().message(error_number)}));
}

std::string kind_of_file(mode_t mode) {
  if (S_ISDIR(mode)) {
    return "a folder";
  }
  if (S_ISLNK(mode)) {
    return "a symbolic link";
  }
  if (S_ISFIFO(mode)) {
    return "a pipe";
  }
  if (S_ISSOCK(mode)) {
    return "a socket";
  }
  return "a device";
}

OpenFile open_regular(const std::filesystem::path& path) {
  // O_NONBLOCK: a pipe must be refused, not waited for.
  Descriptor descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (descriptor.get() < 0) {
    fail_system(path, "cannot open", errno);
  }
  struct stat status {};
  if (::fstat(descriptor.get(), &status) != 0) {
    fail_machine(path, "cannot examine", errno);
  }
  if (!S_ISREG(status.st_mode)) {
    fail_input({.file = path, .expected = "a regular file", .found = kind_of_file(status.st_mode)});
  }
  return {std::move(descriptor), static_cast<std::uint64_t>(status.st_size)};
}

}  // namespace relatent
