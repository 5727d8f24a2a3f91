// Inside formats/: what reading and writing GGUF files agree on.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "formats/gguf.h"
#include "linalg/dtype.h"

namespace relatent::gguf {

static_assert(std::endian::native == std::endian::little);

inline constexpr std::string_view kMagic = "GGUF";
inline constexpr std::uint32_t kVersion = 3;
// The number of arrays among the types of values.
inline constexpr std::uint32_t kArray = 9;
inline constexpr std::size_t kMostDimensions = 4;
// A GgufValue holds scalars of so many types, then arrays of them.
inline constexpr std::size_t kScalars = std::variant_size_v<GgufValue> / 2;

// The next multiple of the alignment, a power of two; nothing when it does not fit.
std::optional<std::uint64_t> padded(std::uint64_t size, std::uint64_t alignment);

// Bytes of a tensor; nothing when a dimension is not positive or the count is not below 2^63.
std::optional<std::uint64_t> tensor_bytes(DType dtype, const std::vector<std::int64_t>& dims);

// What is wrong with the name of a tensor; empty when nothing is.
std::string name_problem(std::string_view name);

}  // namespace relatent::gguf
