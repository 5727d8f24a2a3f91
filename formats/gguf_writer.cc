#include "formats/gguf_writer.h"

#include <bit>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <variant>

#include "formats/files.h"
#include "formats/gguf_layout.h"
#include "linalg/stages.h"

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

// The number of a scalar type, given its place in the variant, which has no arrays between the scalars.
constexpr std::uint32_t code_of(std::size_t place) {
  return static_cast<std::uint32_t>(place < kArray ? place : place + 1);
}

// The number of a tensor type. Throws std::invalid_argument for a dtype that no file of ours holds.
std::uint32_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 0;
    case DType::f16:
      return 1;
    case DType::bf16:
      return 30;
    default:
      throw std::invalid_argument("no GGUF file of ours holds " + std::string(safetensors_name(dtype)));
  }
}

template <typename T>
struct ElementOf {
  using Type = void;
};
template <typename T>
struct ElementOf<std::vector<T>> {
  using Type = T;
};

// The bytes of a header in the making.
class Header {
 public:
  template <typename T>
  void number(T value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }

  void string(std::string_view text) {
    number(std::uint64_t{text.size()});
    text_ += text;
  }

  void value(const GgufValue& value) {
    const bool array = value.index() >= kScalars;
    if (array) {
      number(kArray);
    }
    number(code_of(value.index() % kScalars));
    std::visit(
        [this](const auto& held) {
          using T = std::decay_t<decltype(held)>;
          using Element = typename ElementOf<T>::Type;
          if constexpr (std::is_void_v<Element>) {
            element<T>(held);
          } else {
            number(std::uint64_t{held.size()});
            for (const auto& one : held) {
              element<Element>(one);
            }
          }
        },
        value);
  }

  std::string take() { return std::move(text_); }

 private:
  template <typename T>
  void element(const T& value) {
    if constexpr (std::is_same_v<T, std::string>) {
      string(value);
    } else if constexpr (std::is_same_v<T, bool>) {
      number(static_cast<std::uint8_t>(value ? 1 : 0));
    } else {
      number(value);
    }
  }

  std::string text_;
};

std::uint64_t alignment_of(const GgufMetadata& metadata) {
  for (const auto& [key, value] : metadata) {
    if (key == kGgufAlignmentKey) {
      const auto* alignment = std::get_if<std::uint32_t>(&value);
      if (alignment == nullptr || !std::has_single_bit(*alignment)) {
        throw std::invalid_argument("general.alignment has to be a u32 and a power of two");
      }
      return *alignment;
    }
  }
  return kGgufDefaultAlignment;
}

TensorFileLayout layout_of(const GgufMetadata& metadata, std::vector<TensorSpec> specs) {
  const std::uint64_t alignment = alignment_of(metadata);
  Header header;
  for (const char letter : kMagic) {
    header.number(letter);
  }
  header.number(kVersion);
  header.number(std::uint64_t{specs.size()});
  header.number(std::uint64_t{metadata.size()});
  std::unordered_set<std::string_view> keys;
  for (const auto& [key, value] : metadata) {
    if (key.empty() || !keys.insert(key).second) {
      throw std::invalid_argument("GGUF key empty or used twice: " + key);
    }
    header.string(key);
    header.value(value);
  }
  TensorFileLayout out;
  std::uint64_t end = 0;
  std::unordered_set<std::string> names;
  for (TensorSpec& spec : specs) {
    if (const std::string problem = name_problem(spec.name); !problem.empty()) {
      throw std::invalid_argument(problem + ": " + spec.name);
    }
    if (!names.insert(spec.name).second) {
      throw std::invalid_argument("tensor name used twice: " + spec.name);
    }
    const std::uint32_t type = type_of(spec.dtype);
    const std::optional<std::uint64_t> bytes = tensor_bytes(spec.dtype, spec.shape);
    if (spec.shape.empty() || spec.shape.size() > kMostDimensions || !bytes) {
      throw std::invalid_argument("tensor " + spec.name + ": GGUF has no place for the shape " +
                                  shape_text(spec.shape));
    }
    header.string(spec.name);
    header.number(static_cast<std::uint32_t>(spec.shape.size()));
    const std::vector<std::int64_t> dims(spec.shape.rbegin(), spec.shape.rend());
    for (const std::int64_t dimension : dims) {
      header.number(dimension);
    }
    header.number(type);
    header.number(end);
    const std::uint64_t begin = end;
    const std::optional<std::uint64_t> next =
        __builtin_add_overflow(end, *bytes, &end) ? std::nullopt : padded(end, alignment);
    if (!next) {
      throw std::invalid_argument("tensor " + spec.name + " ends beyond 2^64 bytes");
    }
    end = *next;
    out.tensors.push_back({std::move(spec), begin});
  }
  out.header = header.take();
  out.header.resize(*padded(out.header.size(), alignment));
  if (__builtin_add_overflow(std::uint64_t{out.header.size()}, end, &out.bytes)) {
    throw std::invalid_argument("the tensors end beyond 2^64 bytes");
  }
  for (TensorFileLayout::Place& tensor : out.tensors) {
    tensor.offset += out.header.size();
  }
  return out;
}

}  // namespace

GgufWriter::GgufWriter(const std::filesystem::path& path, const GgufMetadata& metadata,
                       std::vector<TensorSpec> specs)
    : TensorFileWriter(path, layout_of(metadata, std::move(specs))) {}

std::unique_ptr<GgufWriter> GgufWriter::reopen(const std::filesystem::path& path,
                                               const GgufMetadata& metadata, std::vector<TensorSpec> specs) {
  TensorFileLayout layout = layout_of(metadata, std::move(specs));
  std::optional<PendingFile> file = take_up(path, layout);
  // Not make_unique: the constructor is private.
  return file ? std::unique_ptr<GgufWriter>(new GgufWriter(std::move(*file), std::move(layout))) : nullptr;
}

void GgufWriter::flush() {
  const Stage stage("flush");
  TensorFileWriter::flush();
}

void GgufWriter::finish() {
  const Stage stage("flush");
  TensorFileWriter::finish();
}

}  // namespace relatent
