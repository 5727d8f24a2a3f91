#include "formats/gguf_layout.h"

#include <algorithm>
#include <limits>

#include "formats/tensor_file.h"

namespace relatent::gguf {

std::optional<std::uint64_t> padded(std::uint64_t size, std::uint64_t alignment) {
  if (__builtin_add_overflow(size, alignment - 1, &size)) {
    return std::nullopt;
  }
  return size & ~(alignment - 1);
}

std::optional<std::uint64_t> tensor_bytes(DType dtype, const std::vector<std::int64_t>& dims) {
  if (std::any_of(dims.begin(), dims.end(), [](std::int64_t dimension) { return dimension <= 0; })) {
    return std::nullopt;
  }
  const std::optional<std::uint64_t> bytes = dense_bytes(dtype, dims);
  return bytes && *bytes <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())
             ? bytes
             : std::nullopt;
}

std::string name_problem(std::string_view name) {
  if (name.empty()) {
    return "a tensor without a name";
  }
  if (name.find('\0') != std::string_view::npos) {
    return "a tensor name with a NUL";
  }
  if (name.size() > kGgufLongestName) {
    return "a tensor name of " + std::to_string(name.size()) + " bytes";
  }
  return {};
}

}  // namespace relatent::gguf
