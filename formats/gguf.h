// One GGUF file, version 3, little-endian: validated whole before any tensor is touched, read by mapping.
// gguf_writer.h writes it.
//
// Layout: "GGUF", u32 version, i64 tensor count, i64 key count, keys with their values, tensor infos, zeros
// up to the alignment, data. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "formats/files.h"
#include "formats/tensor_file.h"
#include "linalg/dtype.h"

namespace relatent {

// A value of the metadata; readers tell integers and floats of different widths apart, so the type counts.
// Scalars stand in the order of their numbers in a file, arrays of them likewise. Arrays do not nest.
using GgufValue =
    std::variant<std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, std::uint32_t, std::int32_t, float,
                 bool, std::string, std::uint64_t, std::int64_t, double, std::vector<std::uint8_t>,
                 std::vector<std::int8_t>, std::vector<std::uint16_t>, std::vector<std::int16_t>,
                 std::vector<std::uint32_t>, std::vector<std::int32_t>, std::vector<float>, std::vector<bool>,
                 std::vector<std::string>, std::vector<std::uint64_t>, std::vector<std::int64_t>,
                 std::vector<double>>;

// "u32", "string", "array of i32" ...
std::string gguf_type_name(const GgufValue& value);

// Keys and values in the order of the file.
using GgufMetadata = std::vector<std::pair<std::string, GgufValue>>;

inline constexpr std::string_view kGgufAlignmentKey = "general.alignment";
inline constexpr std::uint32_t kGgufDefaultAlignment = 32;
// Of a tensor's name, in bytes; ggml keeps names in 64 with a NUL.
inline constexpr std::size_t kGgufLongestName = 63;

// `shape` is row-major like everywhere else; `dims` is the same list reversed, fastest first, as the file has
// it. `offset` counts from the start of the file.
struct GgufTensor : TensorInfo {
  std::vector<std::int64_t> dims;
};

class GgufFile {
 public:
  // Maps the file and checks everything its header claims: magic, version 3 and little-endian, counts and
  // lengths within the file, keys and tensor names unique and not empty, names of at most 63 bytes without a
  // NUL, known value types, no nested arrays, bools of 0 or 1, one to four positive dimensions whose byte
  // count is below 2^63, tensors of F32, F16 or BF16, an alignment that is a power of two, offsets that each
  // equal the sum of the sizes before them rounded up to the alignment, data within the file and nothing
  // behind it but padding. Throws Error (input) naming file, tensor or key, expected and found.
  static GgufFile open(const std::filesystem::path& path);

  const GgufMetadata& metadata() const { return metadata_; }
  const GgufValue* find(const std::string& key) const;  // nullptr when absent
  // The value of a key, nullptr when absent. Throws Error (input) when it has another type.
  template <typename T>
  const T* find_as(const std::string& key) const {
    const GgufValue* value = find(key);
    if (value == nullptr) {
      return nullptr;
    }
    const T* typed = std::get_if<T>(value);
    if (typed == nullptr) {
      fail_key(key, gguf_type_name(GgufValue(std::in_place_type<T>)), gguf_type_name(*value));
    }
    return typed;
  }
  // The value of a key. Throws Error (input) when it is absent or has another type.
  template <typename T>
  const T& get(const std::string& key) const {
    const T* typed = find_as<T>(key);
    if (typed == nullptr) {
      fail_key(key, gguf_type_name(GgufValue(std::in_place_type<T>)), "no such key");
    }
    return *typed;
  }

  // In the order of their data.
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find_tensor(const std::string& name) const;  // nullptr when absent
  std::span<const std::byte> bytes(const TensorInfo& tensor) const;
  // Lets the kernel drop the pages of a tensor that is done with.
  void release(const TensorInfo& tensor) const { file_.release(tensor.offset, tensor.bytes); }
  std::uint32_t alignment() const { return alignment_; }
  std::uint64_t file_bytes() const { return file_.bytes().size(); }
  const std::filesystem::path& path() const { return file_.path(); }

 private:
  [[noreturn]] void fail_key(const std::string& key, const std::string& expected,
                             const std::string& found) const;

  MappedFile file_;
  std::uint32_t alignment_ = kGgufDefaultAlignment;
  GgufMetadata metadata_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string, std::size_t> keys_;
  std::unordered_map<std::string, std::size_t> names_;
};

}  // namespace relatent
