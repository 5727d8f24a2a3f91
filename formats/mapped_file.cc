#include "formats/mapped_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/open_file.h"

namespace relatent {
namespace {

struct MappedName {
  std::filesystem::path path;
  std::string line;  // for stderr when it is cut
};

// A mapping that lives. A signal handler may read atomics that need no lock, and nothing else.
struct Mapping {
  std::atomic<const std::byte*> begin = nullptr;  // nullptr: the place is free
  std::atomic<const std::byte*> end = nullptr;
  std::atomic<const MappedName*> name = nullptr;
};
static_assert(std::atomic<const std::byte*>::is_always_lock_free);

// Larger checkpoints have some hundred files. Those without a place are read all the same, without a name.
constexpr std::size_t kMostMappings = 4096;
std::array<Mapping, kMostMappings> g_mappings;
std::mutex g_mappings_guard;  // for all but the handler

std::string cut_sentence(const std::filesystem::path& path) {
  return to_sentence({.file = path, .problem = "changed or was cut while it was read"});
}

// nullptr for an address that lies in none. Pointers of different arrays have no order but this.
const Mapping* mapping_at(const void* address) {
  const auto* const byte = static_cast<const std::byte*>(address);
  for (const Mapping& mapping : g_mappings) {
    const std::byte* const begin = mapping.begin;
    if (begin != nullptr && !std::less<>()(byte, begin) && std::less<>()(byte, mapping.end.load())) {
      return &mapping;
    }
  }
  return nullptr;
}

void remember(std::span<const std::byte> bytes, const std::filesystem::path& path) {
  auto name = std::make_unique<MappedName>(MappedName{path, "relatent: " + cut_sentence(path) + "\n"});
  const std::scoped_lock lock(g_mappings_guard);
  for (Mapping& mapping : g_mappings) {
    if (mapping.begin == nullptr) {
      mapping.name = name.release();
      mapping.end = bytes.data() + bytes.size();
      mapping.begin = bytes.data();
      return;
    }
  }
}

void forget(const std::byte* begin) {
  const std::scoped_lock lock(g_mappings_guard);
  for (Mapping& mapping : g_mappings) {
    if (mapping.begin == begin) {
      mapping.begin = nullptr;
      delete mapping.name.exchange(nullptr);
      return;
    }
  }
}

void on_bus_error(int signal, siginfo_t* info, void* /*context*/) {
  // Positive codes are the processor's, others those of kill().
  if (const Mapping* mapping = info->si_code > 0 ? mapping_at(info->si_addr) : nullptr; mapping != nullptr) {
    const std::string& line = mapping->name.load()->line;
    static_cast<void>(::write(STDERR_FILENO, line.data(), line.size()));
    ::_exit(static_cast<int>(ErrorKind::machine));
  }
  // None of ours: the signal ends the program when this returns.
  struct sigaction usual {};
  usual.sa_handler = SIG_DFL;
  ::sigaction(signal, &usual, nullptr);
  ::raise(signal);
}

}  // namespace

void report_cut_files() {
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGBUS, &action, nullptr);
}

std::filesystem::path mapped_file_at(const void* address) {
  const std::scoped_lock lock(g_mappings_guard);
  const Mapping* mapping = mapping_at(address);
  return mapping != nullptr ? mapping->name.load()->path : std::filesystem::path();
}

void fail_cut_file(const std::filesystem::path& path) {
  throw Error(ErrorKind::machine, cut_sentence(path));
}

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
  remember(file.bytes_, path);
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
    forget(bytes_.data());
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

std::string checksum_of(const std::filesystem::path& file) {
  return checksum_of(MappedFile::open(file).bytes());
}

}  // namespace relatent
