// Element types of stored tensors, and their conversion to and from float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace relatent {

// The element types a safetensors file can hold. The first four are the ones relatent computes with.
enum class DType : std::uint8_t {
  bf16,
  f16,
  f32,
  f64,
  i8,
  i16,
  i32,
  i64,
  u8,
  u16,
  u32,
  u64,
  boolean,
  f8_e4m3,
  f8_e5m2
};

// Bytes of one element.
std::size_t size_of(DType dtype);

// The safetensors spelling: "BF16", "F32", "F8_E4M3" ...
std::string_view safetensors_name(DType dtype);
std::optional<DType> dtype_from_safetensors(std::string_view name);

// The spelling of config.json and of --dtype: "bfloat16", "float16", "float32". Only for the floating types.
std::string_view torch_name(DType dtype);
std::optional<DType> dtype_from_torch(std::string_view name);

// True for bf16, f16, f32 and f64, the types the two functions below accept.
bool is_float(DType dtype);

// Widens stored elements to float32 (f64 is rounded). bytes.size() must be out.size() * size_of(dtype);
// throws std::invalid_argument otherwise or when the dtype is not floating.
void decode_floats(DType dtype, std::span<const std::byte> bytes, std::span<float> out);

// Narrows float32 to stored elements, rounding to nearest even. A finite value beyond the largest f16 or bf16
// becomes an infinity: the return value counts these, so that a caller can refuse them. Same preconditions as
// above.
std::size_t encode_floats(DType dtype, std::span<const float> values, std::span<std::byte> out);

// Whether no stored element is NaN or infinite. What is not floating never is, and of the eight-bit types
// nothing is known.
bool all_finite(DType dtype, std::span<const std::byte> bytes);

// The number nearest to value that the dtype can hold (bf16, f16, f32 and f64, infinities included).
float rounded(DType dtype, float value);

}  // namespace relatent
