#include "formats/gguf_layout.h"

namespace relatent::gguf {

std::optional<std::uint64_t> padded(std::uint64_t size, std::uint64_t alignment) {
  if (__builtin_add_overflow(size, alignment - 1, &size)) {
    return std::nullopt;
  }
  return size & ~(alignment - 1);
}

std::optional<std::uint64_t> tensor_bytes(DType dtype, const std::vector<std::int64_t>& dims) {
  auto product = static_cast<std::int64_t>(size_of(dtype));
  for (const std::int64_t dimension : dims) {
    if (dimension <= 0 || __builtin_mul_overflow(product, dimension, &product)) {
      return std::nullopt;
    }
  }
  return static_cast<std::uint64_t>(product);
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
