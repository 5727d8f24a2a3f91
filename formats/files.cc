#include "formats/files.h"

#include <fcntl.h>
#include <stdio.h>  // NOLINT(modernize-deprecated-headers): renameat2 is not in <cstdio>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/mapped_file.h"
#include "formats/open_file.h"

namespace relatent {
namespace {

// What filesystems share between files is made of these.
constexpr off_t kBlock = 4096;

// What a new file is created with; the umask takes its part.
constexpr mode_t kPublic = 0666;
constexpr mode_t kPrivate = 0600;

// Bytes read before the end of the file, at most buffer.size().
std::size_t read_fully(int fd, std::uint64_t offset, std::span<std::byte> buffer,
                       const std::filesystem::path& path) {
  std::size_t done = 0;
  while (done < buffer.size()) {
    const ssize_t got =
        ::pread(fd, buffer.data() + done, buffer.size() - done, static_cast<off_t>(offset + done));
    if (got < 0) {
      if (errno == EINTR) {
        continue;
      }
      fail_machine(path, "cannot read", errno);
    }
    if (got == 0) {
      break;
    }
    done += static_cast<std::size_t>(got);
  }
  return done;
}

void write_fully(int fd, std::uint64_t offset, std::span<const std::byte> bytes,
                 const std::filesystem::path& path) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t put =
        ::pwrite(fd, bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (put < 0) {
      if (errno == EINTR) {
        continue;
      }
      const int reason = errno;
      if (reason == EFAULT) {
        // Not for want of room: the bytes are those of a file that is not there any more.
        if (const std::filesystem::path source = mapped_file_at(bytes.data() + done); !source.empty()) {
          fail_cut_file(source);
        }
      }
      fail_machine(path, "cannot write", reason);
    }
    done += static_cast<std::size_t>(put);
  }
}

void set_mode(int fd, mode_t mode) {
  // Filesystems without permissions are no reason to stop: what they refuse was not granted before either.
  static_cast<void>(::fchmod(fd, mode));
}

// A finished file that is taken up again may have got the permissions of a write-protected source.
void make_writable(const std::filesystem::path& partial) {
  struct stat status {};
  if (::lstat(partial.c_str(), &status) == 0 && S_ISREG(status.st_mode) &&
      (status.st_mode & kPrivate) != kPrivate) {
    // Where this fails, opening says why.
    static_cast<void>(::chmod(partial.c_str(), (status.st_mode & 0777U) | kPrivate));
  }
}

// Opens a partial file for writing and locks it.
Descriptor open_locked(const std::filesystem::path& partial, bool create, mode_t mode) {
  while (true) {
    // O_NONBLOCK: a pipe must be refused, not waited for.
    Descriptor out(
        ::open(partial.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | (create ? O_CREAT : 0), mode));
    if (out.get() < 0) {
      if (!create) {
        fail_system(partial, "cannot open", errno);
      }
      fail_machine(partial, "cannot create", errno);
    }
    struct stat opened {};
    if (::fstat(out.get(), &opened) != 0) {
      fail_machine(partial, "cannot examine", errno);
    }
    if (!S_ISREG(opened.st_mode)) {
      fail_usage(partial.string() + ": is " + kind_of_file(opened.st_mode) +
                 ", and a file is to be written there (delete it, or choose another name)");
    }
    // Filesystems without locks are no reason to stop.
    if (::flock(out.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      fail_usage(partial.string() + ": another run is writing there (wait for it, or choose another name)");
    }
    // Between the two steps another run may have given the file its final name, or removed it.
    struct stat named {};
    if (::lstat(partial.c_str(), &named) == 0 && named.st_dev == opened.st_dev &&
        named.st_ino == opened.st_ino) {
      return out;
    }
  }
}

void require_open(int fd) {
  if (fd < 0) {
    throw std::logic_error("PendingFile: used after commit");
  }
}

void require_range(const std::filesystem::path& path, std::uint64_t offset, std::uint64_t size) {
  constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
  if (offset > kLargest || size > kLargest - offset) {
    fail_machine(path, "cannot hold " + std::to_string(size) + " bytes at " + std::to_string(offset), EFBIG);
  }
}

}  // namespace

std::filesystem::path parent_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

std::vector<std::filesystem::path> entries_of(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> out;
  std::error_code error;
  std::filesystem::directory_iterator entry(folder, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    out.push_back(entry->path());
  }
  if (error) {
    fail_system(folder, "cannot list the folder", error.value());
  }
  std::sort(out.begin(), out.end());
  return out;
}

// Makes a rename or a new entry of the folder survive a power cut.
void flush_folder(const std::filesystem::path& folder) {
  const Descriptor descriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (descriptor.get() < 0) {
    fail_machine(folder, "cannot open", errno);
  }
  // Some filesystems have nothing to flush for a folder and say EINVAL.
  if (::fsync(descriptor.get()) != 0 && errno != EINVAL) {
    fail_machine(folder, "cannot flush", errno);
  }
}

bool is_plain_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string_view::npos &&
         name.find('\0') == std::string_view::npos;
}

FilePermissions permissions_of(const std::filesystem::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    fail_system(path, "cannot examine", errno);
  }
  return static_cast<std::filesystem::perms>(status.st_mode & 0777U);
}

std::string read_text(const std::filesystem::path& path, std::size_t max_bytes) {
  const OpenFile opened = open_regular(path);
  if (opened.size > max_bytes) {
    fail_input({.file = path,
                .problem = "too large",
                .expected = "at most " + std::to_string(max_bytes) + " bytes",
                .found = std::to_string(opened.size)});
  }
  std::string text(opened.size, '\0');
  text.resize(read_fully(opened.descriptor.get(), 0, std::as_writable_bytes(std::span<char>(text)), path));
  return text;
}

PendingFile::PendingFile(std::filesystem::path path, FilePermissions permissions, Start start)
    : path_(std::move(path)), permissions_(permissions) {
  require_replaceable(path_);
  const std::filesystem::path partial = partial_path();
  if (start == Start::as_kept) {
    make_writable(partial);
  }
  Descriptor descriptor = open_locked(partial, start == Start::empty, permissions_ ? kPrivate : kPublic);
  if (permissions_) {
    set_mode(descriptor.get(), kPrivate);  // it may have been there already
  }
  // Not O_TRUNC: until it was locked, the file may have been another's.
  if (start == Start::empty && ::ftruncate(descriptor.get(), 0) != 0) {
    fail_machine(partial, "cannot empty", errno);
  }
  fd_ = descriptor.release();
}

PendingFile::PendingFile(std::filesystem::path path, FilePermissions permissions)
    : PendingFile(std::move(path), permissions, Start::empty) {}

PendingFile PendingFile::reopen(std::filesystem::path path, FilePermissions permissions) {
  return {std::move(path), permissions, Start::as_kept};
}

PendingFile::PendingFile(PendingFile&& other) noexcept
    : path_(std::move(other.path_)),
      permissions_(other.permissions_),
      fd_(std::exchange(other.fd_, -1)),
      kept_(other.kept_) {}

PendingFile::~PendingFile() {
  if (fd_ >= 0) {
    // Before the lock goes: what has this name afterwards may be another's.
    if (!kept_) {
      ::unlink(partial_path().c_str());
    }
    ::close(fd_);
  }
}

std::filesystem::path PendingFile::partial_path() const {
  std::filesystem::path partial = path_;
  partial += ".partial";
  return partial;
}

// Those below change the file, if not the object.
// NOLINTBEGIN(readability-make-member-function-const)
void PendingFile::reserve(std::uint64_t size) {
  require_open(fd_);
  require_range(partial_path(), 0, size);
  const std::string problem = "cannot reserve " + std::to_string(size) + " bytes";
  if (::ftruncate(fd_, static_cast<off_t>(size)) != 0) {
    fail_machine(partial_path(), problem, errno);
  }
  if (size == 0) {
    return;
  }
  // fallocate rather than posix_fallocate, which writes every block where the filesystem cannot reserve.
  int result = 0;
  do {
    result = ::fallocate(fd_, 0, 0, static_cast<off_t>(size));
  } while (result != 0 && errno == EINTR);
  if (result != 0 && errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL) {
    fail_machine(partial_path(), problem, errno);
  }
}

void PendingFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  require_open(fd_);
  require_range(partial_path(), offset, bytes.size());
  write_fully(fd_, offset, bytes, partial_path());
}

void PendingFile::copy_at(std::uint64_t offset, const std::filesystem::path& source,
                          std::uint64_t source_offset, std::uint64_t size) {
  require_open(fd_);
  require_range(partial_path(), offset, size);
  require_range(source, source_offset, size);
  const OpenFile opened = open_regular(source);
  if (source_offset > opened.size || size > opened.size - source_offset) {
    fail_input({.file = source,
                .problem = "ends too early",
                .expected = std::to_string(source_offset + size) + " bytes",
                .found = std::to_string(opened.size)});
  }
  auto from = static_cast<off_t>(source_offset);
  auto to = static_cast<off_t>(offset);
  std::uint64_t left = size;
  while (left > 0) {
    constexpr std::uint64_t kLargestStep = std::uint64_t{1} << 30U;
    std::uint64_t step = std::min(left, kLargestStep);
    // Filesystems that can share blocks do so for ranges that begin with one in both files.
    if (from % kBlock == to % kBlock && from % kBlock != 0) {
      step = std::min(step, static_cast<std::uint64_t>(kBlock - from % kBlock));
    }
    const ssize_t copied =
        ::copy_file_range(opened.descriptor.get(), &from, fd_, &to, static_cast<std::size_t>(step), 0);
    if (copied > 0) {
      left -= static_cast<std::uint64_t>(copied);
      continue;
    }
    if (copied == 0 || errno == EXDEV || errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP) {
      break;  // not between these two files: through memory then
    }
    if (errno != EINTR) {
      fail_machine(partial_path(), "cannot copy from " + source.string(), errno);
    }
  }
  if (left == 0) {
    return;
  }
  std::vector<std::byte> buffer(static_cast<std::size_t>(std::min<std::uint64_t>(left, 4U << 20U)));
  while (left > 0) {
    const auto step = static_cast<std::size_t>(std::min<std::uint64_t>(left, buffer.size()));
    const std::span<std::byte> piece = std::span(buffer).first(step);
    if (read_fully(opened.descriptor.get(), static_cast<std::uint64_t>(from), piece, source) != step) {
      fail_input({.file = source, .problem = "became shorter while it was copied"});
    }
    write_fully(fd_, static_cast<std::uint64_t>(to), piece, partial_path());
    from += static_cast<off_t>(step);
    to += static_cast<off_t>(step);
    left -= step;
  }
}

void PendingFile::flush() {
  require_open(fd_);
  if (::fdatasync(fd_) != 0) {
    fail_machine(partial_path(), "cannot flush", errno);
  }
}

// NOLINTEND(readability-make-member-function-const)

void PendingFile::commit() {
  require_open(fd_);
  if (permissions_) {
    set_mode(fd_, static_cast<mode_t>(*permissions_));
  }
  if (::fsync(fd_) != 0) {
    fail_machine(partial_path(), "cannot flush", errno);
  }
  require_replaceable(path_);
  if (::rename(partial_path().c_str(), path_.c_str()) != 0) {
    fail_machine(path_, "cannot rename the finished file into place", errno);
  }
  ::close(std::exchange(fd_, -1));
  flush_folder(parent_of(path_));
}

void write_text(const std::filesystem::path& path, std::string_view text, FilePermissions permissions) {
  PendingFile file(path, permissions);
  file.write_at(0, std::as_bytes(std::span<const char>(text)));
  file.commit();
}

void copy_whole_file(const std::filesystem::path& source, const std::filesystem::path& target) {
  const std::uint64_t size = open_regular(source).size;
  PendingFile copy(target, permissions_of(source));
  copy.reserve(size);
  copy.copy_at(0, source, 0, size);
  copy.commit();
}

std::filesystem::path output_name(const std::filesystem::path& path) {
  std::string text = path.string();
  while (text.size() > 1 && text.back() == '/') {
    text.pop_back();
  }
  if (text.empty()) {
    fail_usage("the name of the output is empty");
  }
  const std::filesystem::path parent = parent_of(text);
  struct stat status {};
  if (::stat(parent.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
    fail_usage(text + ": its parent folder " + parent.string() + " does not exist");
  }
  return text;
}

void require_replaceable(const std::filesystem::path& path) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    fail_usage(path.string() + ": is " + kind_of_file(status.st_mode) +
               ", and a file is to be written there (choose another name)");
  }
}

void require_absent(const std::filesystem::path& path) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) == 0) {
    fail_usage(path.string() + ": exists already (choose another name or delete it)");
  }
}

void rename_new_folder(const std::filesystem::path& staging, const std::filesystem::path& path) {
  flush_folder(staging);
  int result = ::renameat2(AT_FDCWD, staging.c_str(), AT_FDCWD, path.c_str(), RENAME_NOREPLACE);
  if (result != 0 && (errno == EINVAL || errno == ENOSYS)) {
    // A filesystem without RENAME_NOREPLACE: claim the name with an empty folder of our own, which rename may
    // replace only as long as it is empty.
    result = ::mkdir(path.c_str(), 0777);
    if (result == 0) {
      result = ::rename(staging.c_str(), path.c_str());
    }
  }
  if (result != 0) {
    if (errno == EEXIST || errno == ENOTEMPTY) {
      fail_usage(path.string() + ": appeared while its contents were being written");
    }
    fail_machine(path, "cannot rename the finished folder into place", errno);
  }
  flush_folder(parent_of(path));
}

PendingFolder::PendingFolder(const std::filesystem::path& path) : path_(output_name(path)) {
  require_absent(path_);
  staging_ = path_;
  staging_ += ".partial";
  if (::mkdir(staging_.c_str(), 0777) != 0) {
    if (errno == EEXIST) {
      fail_usage(staging_.string() + ": is left over from an interrupted run (delete it and try again)");
    }
    fail_machine(staging_, "cannot create the folder", errno);
  }
}

PendingFolder::~PendingFolder() {
  if (!committed_) {
    std::error_code ignored;
    std::filesystem::remove_all(staging_, ignored);
  }
}

void PendingFolder::commit() {
  if (committed_) {
    throw std::logic_error("PendingFolder: committed twice");
  }
  rename_new_folder(staging_, path_);
  committed_ = true;
}

}  // namespace relatent
