// Numbers that an interrupted run leaves for the one that goes on: whole blocks of bytes behind a checksum,
// read by the program that wrote them and by nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <vector>

#include "formats/files.h"

namespace relatent {

// Writes a count and blocks to a file that gets its name when the caller commits it. Throws Error (machine).
PendingFile write_state(const std::filesystem::path& path, std::int64_t number,
                        const std::vector<std::span<const std::byte>>& blocks);

// Fills blocks of the same sizes; the count. Nothing, with the blocks as they were, when there is no such
// file or it is not whole and of these sizes. Throws Error (machine) when it cannot be read.
std::optional<std::int64_t> read_state(const std::filesystem::path& path,
                                       const std::vector<std::span<std::byte>>& blocks);

// The bytes of a dense matrix or vector.
template <typename Dense>
std::span<const std::byte> bytes_of(const Dense& dense) {
  return std::as_bytes(std::span(dense.data(), static_cast<std::size_t>(dense.size())));
}
template <typename Dense>
std::span<std::byte> writable_bytes_of(Dense& dense) {
  return std::as_writable_bytes(std::span(dense.data(), static_cast<std::size_t>(dense.size())));
}

}  // namespace relatent
