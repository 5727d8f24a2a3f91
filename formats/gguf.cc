#include "formats/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "formats/error.h"
#include "formats/gguf_layout.h"

namespace relatent {
namespace {

using gguf::kArray;
using gguf::kMagic;
using gguf::kMostDimensions;
using gguf::kScalars;
using gguf::kVersion;
using gguf::name_problem;
using gguf::padded;
using gguf::tensor_bytes;

// What a key and a tensor info take at least, so that counts are known to be false before anything is
// allocated: a name of one byte, a type and a value of one byte; a name, the number of dimensions, one of
// them, type and offset.
constexpr std::uint64_t kShortestKey = 8 + 1 + 4 + 1;
constexpr std::uint64_t kShortestTensor = 8 + 1 + 4 + 8 + 4 + 8;

constexpr std::array<std::string_view, kScalars> kTypeNames = {"u8",  "i8",   "u16",    "i16", "u32", "i32",
                                                               "f32", "bool", "string", "u64", "i64", "f64"};

struct TensorType {
  std::uint32_t code;
  std::string_view name;
};

constexpr std::array kQuantised{
    TensorType{2, "Q4_0"},      TensorType{3, "Q4_1"},      TensorType{4, "Q4_2"},
    TensorType{5, "Q4_3"},      TensorType{6, "Q5_0"},      TensorType{7, "Q5_1"},
    TensorType{8, "Q8_0"},      TensorType{9, "Q8_1"},      TensorType{10, "Q2_K"},
    TensorType{11, "Q3_K"},     TensorType{12, "Q4_K"},     TensorType{13, "Q5_K"},
    TensorType{14, "Q6_K"},     TensorType{15, "Q8_K"},     TensorType{16, "IQ2_XXS"},
    TensorType{17, "IQ2_XS"},   TensorType{18, "IQ3_XXS"},  TensorType{19, "IQ1_S"},
    TensorType{20, "IQ4_NL"},   TensorType{21, "IQ3_S"},    TensorType{22, "IQ2_S"},
    TensorType{23, "IQ4_XS"},   TensorType{29, "IQ1_M"},    TensorType{31, "Q4_0_4_4"},
    TensorType{32, "Q4_0_4_8"}, TensorType{33, "Q4_0_8_8"}, TensorType{34, "TQ1_0"},
    TensorType{35, "TQ2_0"},    TensorType{39, "MXFP4"},    TensorType{40, "NVFP4"},
    TensorType{41, "Q1_0"},
};

constexpr std::array kOtherTypes{
    TensorType{24, "I8"},  TensorType{25, "I16"}, TensorType{26, "I32"},
    TensorType{27, "I64"}, TensorType{28, "F64"},
};

template <std::size_t Size>
std::optional<std::string> name_in(const std::array<TensorType, Size>& types, std::uint32_t code) {
  const auto found =
      std::find_if(types.begin(), types.end(), [code](const TensorType& type) { return type.code == code; });
  return found == types.end() ? std::nullopt : std::optional<std::string>(found->name);
}

std::optional<DType> dtype_of(std::uint32_t code) {
  switch (code) {
    case 0:
      return DType::f32;
    case 1:
      return DType::f16;
    case 30:
      return DType::bf16;
    default:
      return std::nullopt;
  }
}

// Walks through a header; every step is checked against what is left of the file.
class Reader {
 public:
  Reader(const std::filesystem::path& file, std::span<const std::byte> bytes) : file_(file), bytes_(bytes) {}

  std::uint64_t position() const { return position_; }
  std::uint64_t left() const { return bytes_.size() - position_; }

  template <typename T>
  T number(const char* what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
    return value;
  }

  std::string string(const char* what) {
    const auto length = number<std::uint64_t>(what);
    const std::span<const std::byte> bytes = take(length, what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  // A count of things of at least `shortest` bytes each.
  void require_room(std::uint64_t count, std::uint64_t shortest, const char* what) const {
    if (count > left() / shortest) {
      fail_input({.file = file_,
                  .problem = "the file is truncated",
                  .expected = std::to_string(count) + " " + what,
                  .found = std::to_string(left()) + " bytes for them"});
    }
  }

  template <typename T>
  T element(const std::string& key) {
    if constexpr (std::is_same_v<T, std::string>) {
      return string("a string");
    } else if constexpr (std::is_same_v<T, bool>) {
      const auto value = number<std::uint8_t>("a bool");
      if (value > 1) {
        complain(key, "a bool of 0 or 1", std::to_string(value));
      }
      return value == 1;
    } else {
      return number<T>("a value");
    }
  }

  template <typename T>
  GgufValue value(const std::string& key, bool array) {
    if (!array) {
      return GgufValue(std::in_place_type<T>, element<T>(key));
    }
    const auto count = number<std::uint64_t>("the length of an array");
    constexpr std::uint64_t kShortest = std::is_same_v<T, std::string> ? 8 : sizeof(T);
    require_room(count, kShortest, "elements of an array");
    std::vector<T> values;
    values.reserve(count);
    for (std::uint64_t i = 0; i < count; ++i) {
      values.push_back(element<T>(key));
    }
    return GgufValue(std::in_place_type<std::vector<T>>, std::move(values));
  }

  GgufValue value(const std::string& key) {
    auto type = number<std::uint32_t>("the type of a value");
    const bool array = type == kArray;
    if (array) {
      type = number<std::uint32_t>("the type of an array");
      if (type == kArray) {
        complain(key, "an array of scalars or strings", "an array of arrays");
      }
    }
    switch (type) {
      case 0:
        return value<std::uint8_t>(key, array);
      case 1:
        return value<std::int8_t>(key, array);
      case 2:
        return value<std::uint16_t>(key, array);
      case 3:
        return value<std::int16_t>(key, array);
      case 4:
        return value<std::uint32_t>(key, array);
      case 5:
        return value<std::int32_t>(key, array);
      case 6:
        return value<float>(key, array);
      case 7:
        return value<bool>(key, array);
      case 8:
        return value<std::string>(key, array);
      case 10:
        return value<std::uint64_t>(key, array);
      case 11:
        return value<std::int64_t>(key, array);
      case 12:
        return value<double>(key, array);
      default:
        complain(key, "a value type from 0 to 12", std::to_string(type));
    }
  }

  [[noreturn]] void complain(const std::string& key, const std::string& expected,
                             const std::string& found) const {
    fail_input({.file = file_,
                .problem = "key \"" + key.substr(0, 200) + "\"",
                .expected = expected,
                .found = found});
  }

 private:
  std::span<const std::byte> take(std::uint64_t size, const char* what) {
    if (size > left()) {
      fail_input(
          {.file = file_,
           .problem = "the file is truncated",
           .expected = std::to_string(size) + " bytes of " + what + " at byte " + std::to_string(position_),
           .found = std::to_string(left())});
    }
    const std::span<const std::byte> taken = bytes_.subspan(position_, size);
    position_ += size;
    return taken;
  }

  const std::filesystem::path& file_;
  std::span<const std::byte> bytes_;
  std::uint64_t position_ = 0;
};

void check_beginning(const std::filesystem::path& file, Reader& reader, std::span<const std::byte> bytes) {
  if (bytes.size() < kMagic.size() || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    fail_input({.file = file,
                .problem = "not a GGUF file",
                .expected = "a file that begins with GGUF",
                .found = bytes.empty() ? "an empty file" : "other bytes"});
  }
  static_cast<void>(reader.number<std::uint32_t>("the magic"));
  const auto version = reader.number<std::uint32_t>("the version");
  if (version == kVersion) {
    return;
  }
  // A small number in the other byte order.
  if (version != 0 && (version & 0xffffU) == 0) {
    fail_input({.file = file,
                .problem = "the byte order",
                .expected = "a little-endian GGUF file",
                .found = "a big-endian one",
                .next_step = "convert the source again for little-endian machines"});
  }
  fail_input({.file = file,
              .problem = "the version of the format",
              .expected = "GGUF version 3",
              .found = "version " + std::to_string(version),
              .next_step = "convert the source again with a newer converter"});
}

// A tensor info; its offset still counts from the beginning of the data.
GgufTensor read_tensor(const std::filesystem::path& file, Reader& reader) {
  GgufTensor tensor;
  tensor.name = reader.string("a tensor name");
  const auto complain = [&](const std::string& problem, const std::string& expected, const std::string& found,
                            const std::string& next_step = {}) {
    fail_input({.file = file,
                .tensor = tensor.name,
                .problem = problem,
                .expected = expected,
                .found = found,
                .next_step = next_step});
  };
  if (const std::string problem = name_problem(tensor.name); !problem.empty()) {
    complain(problem, "1 to " + std::to_string(kGgufLongestName) + " bytes without a NUL", "");
  }
  const auto count = reader.number<std::uint32_t>("the number of dimensions");
  if (count == 0 || count > kMostDimensions) {
    complain("dimensions", "1 to 4", std::to_string(count));
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    tensor.dims.push_back(reader.number<std::int64_t>("a dimension"));
  }
  tensor.shape.assign(tensor.dims.rbegin(), tensor.dims.rend());
  const auto type = reader.number<std::uint32_t>("a tensor type");
  const std::optional<DType> dtype = dtype_of(type);
  if (!dtype) {
    if (const std::optional<std::string> quantised = name_in(kQuantised, type)) {
      complain("its numbers are quantised", "F32, F16 or BF16", *quantised,
               "give a file of dequantised tensors, or the checkpoint it was made of");
    }
    complain("tensor type", "F32, F16 or BF16",
             name_in(kOtherTypes, type).value_or("type " + std::to_string(type)));
  }
  tensor.dtype = *dtype;
  const std::optional<std::uint64_t> bytes = tensor_bytes(tensor.dtype, tensor.dims);
  if (!bytes) {
    complain("dimensions", "positive ones and a byte count below 2^63", shape_text(tensor.dims));
  }
  tensor.bytes = *bytes;
  tensor.offset = reader.number<std::uint64_t>("an offset");
  return tensor;
}

// Checks that the tensors lie one behind the other from data_begin, and makes their offsets count from the
// start of the file.
void place_tensors(const std::filesystem::path& file, std::vector<GgufTensor>& tensors,
                   std::uint64_t header_end, std::uint64_t alignment, std::uint64_t file_bytes) {
  // Header and file lie in memory, so that this does not overflow.
  const std::uint64_t begin = *padded(header_end, alignment);
  std::uint64_t next = 0;
  for (GgufTensor& tensor : tensors) {
    if (tensor.offset != next) {
      fail_input({.file = file,
                  .tensor = tensor.name,
                  .problem = "offset",
                  .expected = std::to_string(next) + ", the aligned end of the tensors before it",
                  .found = std::to_string(tensor.offset)});
    }
    if (begin > file_bytes || next > file_bytes - begin || tensor.bytes > file_bytes - begin - next) {
      fail_input({.file = file,
                  .tensor = tensor.name,
                  .problem = "the file is truncated",
                  .expected =
                      std::to_string(tensor.bytes) + " bytes of data at byte " + std::to_string(begin + next),
                  .found = "a file of " + std::to_string(file_bytes)});
    }
    tensor.offset = begin + next;
    next = *padded(next + tensor.bytes, alignment);
  }
  // Some writers leave out the last padding.
  if (file_bytes > begin + next) {
    fail_input({.file = file,
                .problem = "bytes after the last tensor",
                .expected = "at most " + std::to_string(begin + next) + " bytes",
                .found = std::to_string(file_bytes)});
  }
}

}  // namespace

std::string gguf_type_name(const GgufValue& value) {
  return (value.index() < kScalars ? "" : "array of ") + std::string(kTypeNames[value.index() % kScalars]);
}

GgufFile GgufFile::open(const std::filesystem::path& path) {
  GgufFile result;
  result.file_ = MappedFile::open(path);
  Reader reader(path, result.file_.bytes());
  check_beginning(path, reader, result.file_.bytes());
  const auto tensor_count = reader.number<std::uint64_t>("the number of tensors");
  const auto key_count = reader.number<std::uint64_t>("the number of keys");
  reader.require_room(tensor_count, kShortestTensor, "tensors");
  reader.require_room(key_count, kShortestKey, "keys");

  for (std::uint64_t i = 0; i < key_count; ++i) {
    std::string key = reader.string("a key");
    if (key.empty()) {
      fail_input({.file = path, .problem = "key " + std::to_string(i) + " is empty"});
    }
    if (!result.keys_.emplace(key, i).second) {
      fail_input({.file = path, .problem = "key \"" + key.substr(0, 200) + "\" appears twice"});
    }
    GgufValue value = reader.value(key);
    result.metadata_.emplace_back(std::move(key), std::move(value));
  }
  const std::string alignment_key(kGgufAlignmentKey);
  if (const auto* alignment = result.find_as<std::uint32_t>(alignment_key)) {
    if (!std::has_single_bit(*alignment)) {
      reader.complain(alignment_key, "a power of two", std::to_string(*alignment));
    }
    result.alignment_ = *alignment;
  }

  for (std::uint64_t i = 0; i < tensor_count; ++i) {
    GgufTensor tensor = read_tensor(path, reader);
    if (!result.names_.emplace(tensor.name, i).second) {
      fail_input({.file = path, .tensor = tensor.name, .problem = "appears twice in the header"});
    }
    result.tensors_.push_back(std::move(tensor));
  }
  place_tensors(path, result.tensors_, reader.position(), result.alignment_, result.file_bytes());
  return result;
}

const GgufValue* GgufFile::find(const std::string& key) const {
  const auto found = keys_.find(key);
  return found == keys_.end() ? nullptr : &metadata_[found->second].second;
}

const GgufTensor* GgufFile::find_tensor(const std::string& name) const {
  const auto found = names_.find(name);
  return found == names_.end() ? nullptr : &tensors_[found->second];
}

std::span<const std::byte> GgufFile::bytes(const TensorInfo& tensor) const {
  const std::span<const std::byte> all = file_.bytes();
  if (tensor.offset > all.size() || tensor.bytes > all.size() - tensor.offset) {
    throw std::invalid_argument("tensor " + tensor.name + " is not one of " + path().string());
  }
  return all.subspan(tensor.offset, tensor.bytes);
}

void GgufFile::fail_key(const std::string& key, const std::string& expected, const std::string& found) const {
  fail_input({.file = path(),
              .problem = "key \"" + key.substr(0, 200) + "\"",
              .expected = expected,
              .found = found});
}

}  // namespace relatent
