#include "formats/narrowing.h"

#include <algorithm>
#include <cmath>

#include "formats/error.h"

namespace relatent {

std::span<const std::byte> narrow_floats(const std::filesystem::path& file, const std::string& tensor,
                                         DType dtype, std::span<const float> values,
                                         std::vector<std::byte>& storage) {
  const auto bad =
      std::find_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
  if (bad != values.end()) {
    fail_input({.file = file,
                .tensor = tensor,
                .problem = "a value to be written is not a number",
                .expected = "finite values",
                .found = std::to_string(*bad) + " at index " + std::to_string(bad - values.begin())});
  }
  if (dtype == DType::f32) {
    return std::as_bytes(values);
  }
  storage.resize(values.size() * size_of(dtype));
  const std::size_t overflows = encode_floats(dtype, values, storage);
  if (overflows != 0) {
    fail_input({.file = file,
                .tensor = tensor,
                .problem = "values are too large for " + std::string(safetensors_name(dtype)),
                .expected = "none",
                .found = std::to_string(overflows) + " of " + std::to_string(values.size()),
                .next_step = "choose a wider dtype"});
  }
  return storage;
}

}  // namespace relatent
