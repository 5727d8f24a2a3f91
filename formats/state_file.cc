#include "formats/state_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/mapped_file.h"

namespace relatent {
namespace {

constexpr std::string_view kMagic = "RLSTATE1";
constexpr std::size_t kChecksumDigits = 32;

// Magic, number and the sizes of the blocks.
std::vector<std::byte> header_of(std::int64_t number, const std::vector<std::size_t>& sizes) {
  std::vector<std::byte> out(kMagic.size() + sizeof(std::uint64_t) * (2 + sizes.size()));
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  std::byte* to = out.data() + kMagic.size();
  const auto put = [&to](std::uint64_t value) {
    std::memcpy(to, &value, sizeof(value));
    to += sizeof(value);
  };
  put(static_cast<std::uint64_t>(number));
  put(sizes.size());
  for (const std::size_t size : sizes) {
    put(size);
  }
  return out;
}

}  // namespace

PendingFile write_state(const std::filesystem::path& path, std::int64_t number,
                        const std::vector<std::span<const std::byte>>& blocks) {
  std::vector<std::size_t> sizes;
  std::uint64_t total = 0;
  for (const auto& block : blocks) {
    sizes.push_back(block.size());
    total += block.size();
  }
  const std::vector<std::byte> header = header_of(number, sizes);
  PendingFile file(path);
  file.reserve(header.size() + total + kChecksumDigits);
  Hasher hasher;
  std::uint64_t offset = 0;
  const auto put = [&](std::span<const std::byte> bytes) {
    file.write_at(offset, bytes);
    offset += bytes.size();
  };
  hasher.add(header);
  put(header);
  for (const auto& block : blocks) {
    hasher.add(block);
    put(block);
  }
  put(std::as_bytes(std::span<const char>(hasher.hexadecimal())));
  return file;
}

std::optional<std::int64_t> read_state(const std::filesystem::path& path,
                                       const std::vector<std::span<std::byte>>& blocks) {
  std::error_code missing;
  if (!std::filesystem::is_regular_file(path, missing)) {
    return std::nullopt;
  }
  const MappedFile file = MappedFile::open(path);
  std::span<const std::byte> rest = file.bytes();
  std::vector<std::size_t> sizes;
  std::uint64_t total = 0;
  for (const auto& block : blocks) {
    sizes.push_back(block.size());
    total += block.size();
  }
  const std::size_t header_bytes = header_of(0, sizes).size();
  if (rest.size() != header_bytes + total + kChecksumDigits) {
    return std::nullopt;
  }
  std::int64_t number = 0;
  std::memcpy(&number, rest.data() + kMagic.size(), sizeof(number));
  if (number < 0) {
    return std::nullopt;
  }
  const std::vector<std::byte> header = header_of(number, sizes);
  Hasher hasher;
  hasher.add(rest.first(rest.size() - kChecksumDigits));
  const std::string expected = hasher.hexadecimal();
  if (!std::equal(header.begin(), header.end(), rest.begin()) ||
      std::memcmp(rest.last(kChecksumDigits).data(), expected.data(), kChecksumDigits) != 0) {
    return std::nullopt;
  }
  rest = rest.subspan(header_bytes);
  for (const auto& block : blocks) {
    std::copy_n(rest.begin(), block.size(), block.begin());
    rest = rest.subspan(block.size());
  }
  return number;
}

}  // namespace relatent
