#include "formats/mapped_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "formats/open_file.h"

namespace relatent {

MappedFile MappedFile::open(const std::filesystem::path& path) {
  const OpenFile opened = open_regular(path);
  MappedFile file;
  file.path_ = path;
  if (opened.size == 0) {
    return file;  // nothing to map
  }
  void* address = ::mmap(nullptr, opened.size, PROT_READ, MAP_SHARED, opened.descriptor.get(), 0);
  if (address == MAP_FAILED) {  // NOLINT(performance-no-int-to-ptr): the macro's own cast
    fail_machine(path, "cannot map", errno);
  }
  file.bytes_ = {static_cast<const std::byte*>(address), static_cast<std::size_t>(opened.size)};
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) {
    ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  }
}

void MappedFile::release(std::size_t offset, std::size_t size) const {
  if (offset >= bytes_.size()) {
    return;
  }
  size = std::min(size, bytes_.size() - offset);
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t begin = (offset + page - 1) / page * page;
  const std::size_t end = (offset + size) / page * page;
  if (begin < end) {
    // Advice only: a refusal costs memory, not correctness.
    static_cast<void>(::madvise(const_cast<std::byte*>(bytes_.data()) + begin, end - begin, MADV_DONTNEED));
  }
}

}  // namespace relatent
