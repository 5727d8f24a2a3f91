// Files as bytes in memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

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

}  // namespace relatent
