// Files as bytes in memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace relatent {

// A read-only mapping of a whole file, which must be a regular file. Movable, not copyable.
class MappedFile {
 public:
  // Throws Error (input when there is no such file, machine otherwise).
  static MappedFile open(const std::filesystem::path& path);
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return bytes_; }
  const std::filesystem::path& path() const { return path_; }
  // Tells the kernel that [offset, offset + size) is not needed any more; only whole pages inside are
  // dropped.
  void release(std::size_t offset, std::size_t size) const;

 private:
  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
};

// XXH3-128 of a whole file, in hexadecimal (hash.h). Throws Error as MappedFile::open does.
std::string checksum_of(const std::filesystem::path& file);

// From here on a mapped file that is cut, or that the disk does not give any more, while it is read ends the
// program with exit code 4 and a sentence that names it, where the system would end it without a word. What
// was being written stays as after any crash: an unfinished run, OUT.partial, that --resume goes on with or
// refuses. Call it before any thread starts.
void report_cut_files();

// The file that is mapped where the address lies; empty when none is.
std::filesystem::path mapped_file_at(const void* address);

// The same sentence, as an Error (machine), for a system call that could not read the mapping.
[[noreturn]] void fail_cut_file(const std::filesystem::path& path);

}  // namespace relatent
