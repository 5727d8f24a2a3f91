// Float32 values on their way into a file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "linalg/dtype.h"

namespace relatent {

// The values as the file is to hold them: their own bytes for f32, otherwise rounded to nearest even into
// `storage`. Throws Error (input) naming the file and the tensor when a value is not finite or too large for
// the dtype.
std::span<const std::byte> narrow_floats(const std::filesystem::path& file, const std::string& tensor,
                                         DType dtype, std::span<const float> values,
                                         std::vector<std::byte>& storage);

}  // namespace relatent
