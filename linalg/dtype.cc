#include "linalg/dtype.h"

#include <array>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "linalg/layouts.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace relatent {
namespace {

// Stored elements are little-endian; here they are read and written as they lie.
static_assert(std::endian::native == std::endian::little);

struct Entry {
  DType dtype;
  std::size_t size;
  std::string_view safetensors;
  std::string_view torch;  // empty: relatent does not compute with it
};

constexpr std::array kEntries{
    Entry{DType::bf16, 2, "BF16", "bfloat16"},
    Entry{DType::f16, 2, "F16", "float16"},
    Entry{DType::f32, 4, "F32", "float32"},
    Entry{DType::f64, 8, "F64", "float64"},
    Entry{DType::i8, 1, "I8", ""},
    Entry{DType::i16, 2, "I16", ""},
    Entry{DType::i32, 4, "I32", ""},
    Entry{DType::i64, 8, "I64", ""},
    Entry{DType::u8, 1, "U8", ""},
    Entry{DType::u16, 2, "U16", ""},
    Entry{DType::u32, 4, "U32", ""},
    Entry{DType::u64, 8, "U64", ""},
    Entry{DType::boolean, 1, "BOOL", ""},
    Entry{DType::f8_e4m3, 1, "F8_E4M3", ""},
    Entry{DType::f8_e5m2, 1, "F8_E5M2", ""},
};

const Entry& entry_of(DType dtype) {
  const auto index = static_cast<std::size_t>(dtype);
  if (index >= kEntries.size() || kEntries[index].dtype != dtype) {
    throw std::invalid_argument("unknown dtype " + std::to_string(index));
  }
  return kEntries[index];
}

constexpr std::uint32_t kMagnitude = 0x7fffffffU;
constexpr std::uint32_t kInfinity = 0x7f800000U;

template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
void store(std::byte* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

float float_from_bf16(std::uint16_t stored) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(stored) << 16U);
}

std::uint16_t bf16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16U) & 1U)) >> 16U;
  const std::uint32_t quiet_nan = (bits >> 16U) | 0x40U;
  return static_cast<std::uint16_t>((bits & kMagnitude) > kInfinity ? quiet_nan : rounded);
}

// Least magnitudes that round to infinity.
constexpr std::uint32_t kBf16Overflow = 0x7f7f8000U;
constexpr std::uint32_t kF16Overflow = 0x477ff000U;  // 65520

bool overflows(float value, std::uint32_t threshold) {
  const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & kMagnitude;
  return magnitude >= threshold && magnitude < kInfinity;
}

// Both directions agree with the F16C instructions bit for bit, NaN included: payloads are cut, NaNs made
// quiet.
float float_from_f16(std::uint16_t stored) {
  const std::uint32_t sign = static_cast<std::uint32_t>(stored & 0x8000U) << 16U;
  const std::uint32_t magnitude = stored & 0x7fffU;
  const std::uint32_t shifted = magnitude << 13U;
  const std::uint32_t normal = shifted + 0x38000000U;
  const std::uint32_t special = shifted | kInfinity | (magnitude > 0x7c00U ? 0x400000U : 0U);
  const auto subnormal = std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24F);
  const std::uint32_t finite = magnitude < 0x400U ? subnormal : normal;
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00U ? special : finite));
}

std::uint16_t f16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16U) & 0x8000U;
  const std::uint32_t magnitude = bits & kMagnitude;
  const std::uint32_t normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13U) & 1U)) >> 13U;
  // One half has units of 2^-24 in its last place, as f16 subnormals do: the addition rounds to nearest even.
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude < 0x38800000U ? magnitude : 0U) + 0.5F) -
      0x3f000000U;
  const std::uint32_t quiet_nan = 0x7e00U | ((magnitude >> 13U) & 0x3ffU);
  const std::uint32_t finite = magnitude < 0x38800000U ? subnormal : normal;
  const std::uint32_t number = magnitude >= kF16Overflow ? 0x7c00U : finite;
  return static_cast<std::uint16_t>(sign | (magnitude > kInfinity ? quiet_nan : number));
}

void decode_f16(const std::byte* from, std::span<float> out) {
  std::size_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= out.size(); i += 8) {
    _mm256_storeu_ps(out.data() + i, _mm256_cvtph_ps(load<__m128i>(from + 2 * i)));
  }
#endif
  for (; i < out.size(); ++i) {
    out[i] = float_from_f16(load<std::uint16_t>(from + 2 * i));
  }
}

void encode_f16(std::span<const float> values, std::byte* to) {
  std::size_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= values.size(); i += 8) {
    store(to + 2 * i,
          _mm256_cvtps_ph(_mm256_loadu_ps(values.data() + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (; i < values.size(); ++i) {
    store(to + 2 * i, f16_from_float(values[i]));
  }
}

std::size_t count_overflows(std::span<const float> values, std::uint32_t threshold) {
  std::size_t count = 0;
  for (const float value : values) {
    count += overflows(value, threshold) ? 1 : 0;
  }
  return count;
}

void require_fit(DType dtype, std::size_t bytes, std::size_t elements) {
  if (!is_float(dtype)) {
    throw std::invalid_argument(std::string(safetensors_name(dtype)) + " is not a floating type");
  }
  if (bytes % size_of(dtype) != 0 || bytes / size_of(dtype) != elements) {
    throw std::invalid_argument(std::to_string(bytes) + " bytes are not " + std::to_string(elements) +
                                " elements of " + std::string(safetensors_name(dtype)));
  }
}

}  // namespace

std::size_t size_of(DType dtype) {
  return entry_of(dtype).size;
}

std::string_view safetensors_name(DType dtype) {
  return entry_of(dtype).safetensors;
}

std::optional<DType> dtype_from_safetensors(std::string_view name) {
  for (const Entry& entry : kEntries) {
    if (entry.safetensors == name) {
      return entry.dtype;
    }
  }
  return std::nullopt;
}

std::string_view torch_name(DType dtype) {
  const Entry& entry = entry_of(dtype);
  if (entry.torch.empty()) {
    throw std::invalid_argument(std::string(entry.safetensors) + " is not a floating type");
  }
  return entry.torch;
}

std::optional<DType> dtype_from_torch(std::string_view name) {
  for (const Entry& entry : kEntries) {
    if (!entry.torch.empty() && entry.torch == name) {
      return entry.dtype;
    }
  }
  return std::nullopt;
}

bool is_float(DType dtype) {
  return !entry_of(dtype).torch.empty();
}

void decode_floats(DType dtype, std::span<const std::byte> bytes, std::span<float> out) {
  require_fit(dtype, bytes.size(), out.size());
  const std::byte* from = bytes.data();
  if (out.empty()) {
    return;
  }
  switch (dtype) {
    case DType::bf16:
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = float_from_bf16(load<std::uint16_t>(from + 2 * i));
      }
      break;
    case DType::f16:
      decode_f16(from, out);
      break;
    case DType::f32:
      std::memcpy(out.data(), from, bytes.size());
      break;
    default:
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = static_cast<float>(load<double>(from + 8 * i));
      }
  }
}

std::size_t encode_floats(DType dtype, std::span<const float> values, std::span<std::byte> out) {
  require_fit(dtype, out.size(), values.size());
  std::byte* to = out.data();
  if (values.empty()) {
    return 0;
  }
  switch (dtype) {
    case DType::bf16:
      for (std::size_t i = 0; i < values.size(); ++i) {
        store(to + 2 * i, bf16_from_float(values[i]));
      }
      return count_overflows(values, kBf16Overflow);
    case DType::f16:
      encode_f16(values, to);
      return count_overflows(values, kF16Overflow);
    case DType::f32:
      std::memcpy(to, values.data(), out.size());
      return 0;
    default:
      for (std::size_t i = 0; i < values.size(); ++i) {
        store(to + 8 * i, static_cast<double>(values[i]));
      }
      return 0;
  }
}

float rounded(DType dtype, float value) {
  std::array<std::byte, 8> stored{};
  const std::span<std::byte> bytes(stored.data(), size_of(dtype));
  encode_floats(dtype, {&value, 1}, bytes);
  float out = 0;
  decode_floats(dtype, bytes, {&out, 1});
  return out;
}

bool all_finite(DType dtype, std::span<const std::byte> bytes) {
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

}  // namespace relatent
