#include "formats/tensor_source.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/safetensors.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Values of one piece of work.
constexpr std::size_t kDecodedAtOnce = std::size_t{1} << 20U;

}  // namespace

MatrixF TensorSource::read_matrix(const std::string& name) const {
  const TensorInfo& tensor = info(name);
  const std::filesystem::path& file = path_of(name);
  if (!is_float(tensor.dtype)) {
    fail_input({.file = file,
                .tensor = name,
                .problem = "dtype",
                .expected = "BF16, F16, F32 or F64",
                .found = std::string(safetensors_name(tensor.dtype))});
  }
  const std::size_t dimensions = tensor.shape.size();
  if (dimensions < 1 || dimensions > 3) {
    fail_input({.file = file,
                .tensor = name,
                .problem = "shape",
                .expected = "one to three dimensions",
                .found = shape_text(tensor.shape)});
  }
  Index rows = 1;
  for (std::size_t i = 0; i + 1 < dimensions; ++i) {
    rows *= tensor.shape[i];
  }
  MatrixF matrix(rows, tensor.shape.back());
  const std::span<const std::byte> stored = bytes(name);
  const std::size_t size = size_of(tensor.dtype);
  const auto count = static_cast<std::size_t>(matrix.size());
  parallel_for((count + kDecodedAtOnce - 1) / kDecodedAtOnce, [&](std::size_t i) {
    const std::size_t first = i * kDecodedAtOnce;
    const std::size_t here = std::min(kDecodedAtOnce, count - first);
    decode_floats(tensor.dtype, stored.subspan(first * size, here * size), {matrix.data() + first, here});
  });
  return matrix;
}

void TensorSource::require_finite(const std::string& name) const {
  if (!all_finite(info(name).dtype, bytes(name))) {
    fail_input({path_of(name), name, "holds NaN or infinity", "finite numbers", "others",
                "get the checkpoint anew: no model computes with these"});
  }
  release(name);
}

std::uint64_t TensorSource::tensor_bytes() const {
  std::uint64_t sum = 0;
  for (const std::string& name : tensor_names()) {
    sum += info(name).bytes;
  }
  return sum;
}

std::string TensorSource::fingerprint() const {
  const std::vector<std::string> names = tensor_names();
  Hasher hasher;
  hasher.add_number(names.size());
  for (const std::string& name : names) {
    const TensorInfo& tensor = info(name);
    hasher.add_text(name);
    hasher.add_text(safetensors_name(tensor.dtype));
    hasher.add_number(tensor.shape.size());
    for (const std::int64_t dimension : tensor.shape) {
      hasher.add_number(static_cast<std::uint64_t>(dimension));
    }
    hasher.add(bytes(name));
    release(name);
  }
  hasher.add_text(nlohmann::json(config()).dump());
  return hasher.hexadecimal();
}

}  // namespace relatent
