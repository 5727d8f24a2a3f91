#include "convert/verify/structure.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <utility>

#include "formats/checkpoint.h"
#include "formats/mapped_file.h"
#include "formats/safetensors.h"
#include "linalg/dtype.h"
#include "linalg/layouts.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Numbers that are cast and compared at once.
constexpr std::size_t cast_at_once = std::size_t{1} << 16U;
// What a conversion has no reason to change.
constexpr std::array<const char*, 4> kept_keys = {"bos_token_id", "eos_token_id", "pad_token_id",
                                                  "max_position_embeddings"};

enum class Comparison { same, cast, other };

bool finite(DType dtype, std::span<const std::byte> bytes) {
  switch (dtype) {
    case DType::f64:
      return no_full_exponent<std::uint64_t>(bytes, 0x7ff0000000000000U);
    case DType::f32:
      return no_full_exponent<std::uint32_t>(bytes, 0x7f800000U);
    case DType::f16:
      return no_full_exponent<std::uint16_t>(bytes, 0x7c00U);
    case DType::bf16:
      return all_finite_bf16(bytes);
    default:
      return true;
  }
}

// Whether `to` is what casting `from` gives, number by number.
bool is_cast(DType from_dtype, std::span<const std::byte> from, DType to_dtype,
             std::span<const std::byte> to) {
  const std::size_t count = from.size() / size_of(from_dtype);
  if (count != to.size() / size_of(to_dtype)) {
    return false;
  }
  std::vector<float> numbers(std::min(cast_at_once, count));
  std::vector<std::byte> encoded(numbers.size() * size_of(to_dtype));
  for (std::size_t first = 0; first < count; first += cast_at_once) {
    const std::size_t here = std::min(cast_at_once, count - first);
    const std::span<float> some(numbers.data(), here);
    decode_floats(from_dtype, from.subspan(first * size_of(from_dtype), here * size_of(from_dtype)), some);
    const std::span<std::byte> bytes(encoded.data(), here * size_of(to_dtype));
    static_cast<void>(encode_floats(to_dtype, some, bytes));
    if (std::memcmp(bytes.data(), to.data() + first * size_of(to_dtype), bytes.size()) != 0) {
      return false;
    }
  }
  return true;
}

Comparison compare(const TensorSource& source, const std::string& from, const TensorSource& converted,
                   const std::string& to) {
  const DType from_dtype = source.info(from).dtype;
  const DType to_dtype = converted.info(to).dtype;
  const std::span<const std::byte> a = source.bytes(from);
  const std::span<const std::byte> b = converted.bytes(to);
  if (from_dtype == to_dtype) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0 ? Comparison::same
                                                                                  : Comparison::other;
  }
  return is_float(from_dtype) && is_float(to_dtype) && is_cast(from_dtype, a, to_dtype, b)
             ? Comparison::cast
             : Comparison::other;
}

// The source's tensor that this one is, whatever it is called.
std::optional<std::string> origin_of(const PlacedTensor& tensor, const Model& source) {
  if (source.has(tensor.role, tensor.layer_idx, tensor.part)) {
    return source.name_of(tensor.role, tensor.layer_idx, tensor.part);
  }
  // A tied head that a layout stores.
  return tensor.role == Role::lm_head ? std::optional(source.name_of(Role::embed_tokens, {})) : std::nullopt;
}

// Counts one tensor of the converted checkpoint; what is wrong with it, or nothing.
std::string check_tensor(const PlacedTensor& tensor, const Model& source, const Model& converted,
                         Structure& out) {
  const TensorSource& files = converted.checkpoint();
  const bool is_finite = finite(files.info(tensor.name).dtype, files.bytes(tensor.name));
  std::string wrong = is_finite ? "" : "holds NaN or infinity";
  if (is_attention(tensor.role)) {
    ++out.converted;
  } else if (const std::optional<std::string> origin = origin_of(tensor, source); !origin) {
    wrong = "is no tensor of the source";
  } else {
    const Comparison found = compare(source.checkpoint(), *origin, files, tensor.name);
    out.copied += found == Comparison::same ? 1 : 0;
    out.cast += found == Comparison::cast ? 1 : 0;
    if (found == Comparison::other && is_finite) {
      wrong = "is not the source's " + *origin;
    }
    source.checkpoint().release(*origin);
  }
  files.release(tensor.name);
  return wrong.empty() ? "" : files.path_of(tensor.name).string() + ": tensor " + tensor.name + " " + wrong;
}

// Tokenizer, chat template and whatever else goes along.
void check_side_files(const Model& source, const Model& converted, std::vector<std::string>& findings) {
  const auto* from = dynamic_cast<const Checkpoint*>(&source.checkpoint());
  const auto* to = dynamic_cast<const Checkpoint*>(&converted.checkpoint());
  if (from == nullptr || to == nullptr) {
    return;
  }
  for (const std::filesystem::path& file : from->side_files()) {
    const std::filesystem::path copy = to->path() / file.filename();
    if (!std::filesystem::exists(copy)) {
      findings.push_back(copy.string() + ": is missing; the source has it");
      continue;
    }
    const MappedFile a = MappedFile::open(file);
    const MappedFile b = MappedFile::open(copy);
    if (!std::ranges::equal(a.bytes(), b.bytes())) {
      findings.push_back(copy.string() + ": is not the source's");
    }
  }
}

void check_config(const Model& source, const Model& converted, std::vector<std::string>& findings) {
  const nlohmann::ordered_json& from = source.checkpoint().config();
  const nlohmann::ordered_json& to = converted.checkpoint().config();
  for (const char* key : kept_keys) {
    if (from.contains(key) && to.contains(key) && from[key] != to[key]) {
      findings.push_back(converted.checkpoint().config_path().string() + ": " + key + " is " +
                         to[key].dump() + ", the source's " + from[key].dump());
    }
  }
}

}  // namespace

Structure check_structure(const Model& source, const Model& converted) {
  const std::vector<PlacedTensor>& tensors = converted.tensors();
  std::vector<std::pair<std::string, Structure>> found(tensors.size());
  parallel_for(tensors.size(), [&](std::size_t i) {
    found[i].first = check_tensor(tensors[i], source, converted, found[i].second);
  });
  Structure out;
  for (auto& [wrong, counts] : found) {
    out.copied += counts.copied;
    out.cast += counts.cast;
    out.converted += counts.converted;
    if (!wrong.empty()) {
      out.findings.push_back(std::move(wrong));
    }
  }
  check_side_files(source, converted, out.findings);
  check_config(source, converted, out.findings);
  return out;
}

}  // namespace relatent
