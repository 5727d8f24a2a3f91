#include "linalg/dtype.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace relatent {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<std::uint16_t> all_patterns() {
  std::vector<std::uint16_t> patterns(65536);
  for (std::size_t i = 0; i < patterns.size(); ++i) {
    patterns[i] = static_cast<std::uint16_t>(i);
  }
  return patterns;
}

template <typename T>
std::vector<float> decode(DType dtype, const std::vector<T>& stored) {
  std::vector<float> values(stored.size());
  decode_floats(dtype, std::as_bytes(std::span(stored)), values);
  return values;
}

struct Encoded {
  std::vector<std::uint16_t> stored;
  std::size_t overflows = 0;
};

Encoded encode16(DType dtype, const std::vector<float>& values) {
  Encoded encoded;
  encoded.stored.resize(values.size());
  encoded.overflows = encode_floats(dtype, values, std::as_writable_bytes(std::span(encoded.stored)));
  return encoded;
}

// The value of a half by the book.
double half_value(std::uint16_t pattern) {
  const int exponent = (pattern >> 10) & 31;
  const double fraction = pattern & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024.0 + fraction, exponent - 25);
  return (pattern & 0x8000) != 0 ? -magnitude : magnitude;
}

// Patterns of finite non-negative numbers grow with their values, so neighbours differ by one.
void expect_nearest_even(DType dtype, std::uint16_t largest, const std::vector<float>& decoded) {
  for (std::uint16_t low = 0; low < largest; ++low) {
    const auto high = static_cast<std::uint16_t>(low + 1);
    const auto middle =
        static_cast<float>((static_cast<double>(decoded[low]) + static_cast<double>(decoded[high])) / 2);
    const std::uint16_t even = low % 2 == 0 ? low : high;
    const float below = std::nextafter(middle, 0.0F);
    const float above = std::nextafter(middle, kInfinity);
    const Encoded encoded =
        encode16(dtype, {below, middle, above, -below, -middle, -above, decoded[low], decoded[high]});
    const auto negative = [](std::uint16_t pattern) { return static_cast<std::uint16_t>(pattern | 0x8000); };
    const std::vector<std::uint16_t> expected = {
        low, even, high, negative(low), negative(even), negative(high), low, high};
    ASSERT_EQ(encoded.stored, expected) << "after pattern " << low;
    ASSERT_EQ(encoded.overflows, 0U);
  }
}

TEST(DType, NamesAndSizes) {
  const std::vector<std::pair<std::string, std::size_t>> names = {
      {"BF16", 2}, {"F16", 2}, {"F32", 4}, {"F64", 8}, {"I8", 1},   {"I16", 2},     {"I32", 4},    {"I64", 8},
      {"U8", 1},   {"U16", 2}, {"U32", 4}, {"U64", 8}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(safetensors_name(dtype), names[i].first);
    EXPECT_EQ(size_of(dtype), names[i].second) << names[i].first;
    EXPECT_EQ(dtype_from_safetensors(names[i].first), dtype);
    EXPECT_EQ(is_float(dtype), i < 4);
    if (i >= 4) {
      EXPECT_THROW(torch_name(dtype), std::invalid_argument);
    }
  }
  for (const char* name : {"", "f32", "F32 ", "F8", "C64", "float32"}) {
    EXPECT_FALSE(dtype_from_safetensors(name).has_value()) << name;
  }
  EXPECT_THROW(size_of(static_cast<DType>(15)), std::invalid_argument);
  EXPECT_THROW(safetensors_name(static_cast<DType>(255)), std::invalid_argument);
}

TEST(DType, TorchNames) {
  const std::vector<std::pair<DType, std::string>> names = {
      {DType::bf16, "bfloat16"}, {DType::f16, "float16"}, {DType::f32, "float32"}, {DType::f64, "float64"}};
  for (const auto& [dtype, name] : names) {
    EXPECT_EQ(torch_name(dtype), name);
    EXPECT_EQ(dtype_from_torch(name), dtype);
  }
  for (const char* name : {"", "half", "int8", "torch.float16", "F16"}) {
    EXPECT_FALSE(dtype_from_torch(name).has_value()) << name;
  }
}

TEST(DType, EveryBf16Pattern) {
  const std::vector<std::uint16_t> patterns = all_patterns();
  const std::vector<float> values = decode(DType::bf16, patterns);
  const Encoded encoded = encode16(DType::bf16, values);
  EXPECT_EQ(encoded.overflows, 0U);
  for (std::size_t i = 0; i < patterns.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]), static_cast<std::uint32_t>(i << 16U));
    // NaNs come back quiet.
    const bool nan = (i & 0x7fffU) > 0x7f80U;
    ASSERT_EQ(encoded.stored[i], nan ? (i | 0x40U) : i);
  }
  expect_nearest_even(DType::bf16, 0x7f7f, values);
}

TEST(DType, EveryF16Pattern) {
  const std::vector<std::uint16_t> patterns = all_patterns();
  const std::vector<float> values = decode(DType::f16, patterns);
  const Encoded encoded = encode16(DType::f16, values);
  EXPECT_EQ(encoded.overflows, 0U);
  for (std::size_t i = 0; i < patterns.size(); ++i) {
    const std::uint32_t magnitude = patterns[i] & 0x7fffU;
    if (magnitude < 0x7c00U) {
      ASSERT_EQ(static_cast<double>(values[i]), half_value(patterns[i])) << i;
      ASSERT_EQ(std::signbit(values[i]), patterns[i] >= 0x8000) << i;
    } else if (magnitude == 0x7c00U) {
      ASSERT_EQ(values[i], patterns[i] >= 0x8000 ? -kInfinity : kInfinity);
    } else {
      const std::uint32_t sign = static_cast<std::uint32_t>(patterns[i] & 0x8000U) << 16U;
      ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]), sign | 0x7fc00000U | ((magnitude & 0x3ffU) << 13U));
    }
    ASSERT_EQ(encoded.stored[i], magnitude > 0x7c00U ? (i | 0x200U) : i);
  }
  expect_nearest_even(DType::f16, 0x7bff, values);
}

// Short runs take another path than long ones where there are vector instructions.
TEST(DType, ResultsDoNotDependOnLengthOrAlignment) {
  std::mt19937 random(7);
  std::vector<float> values(1000);
  for (float& value : values) {
    value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
  }
  for (const float exponent : {-30.0F, -15.0F, 0.0F, 15.0F, 17.0F}) {
    for (int i = 0; i < 100; ++i) {
      const float fraction = 1.0F + static_cast<float>(random() % 4096) / 8192.0F;
      values.push_back(std::ldexp(fraction, static_cast<int>(exponent)));
    }
  }
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32, DType::f64}) {
    const std::size_t size = size_of(dtype);
    std::vector<std::byte> whole(values.size() * size + 1);
    const std::span<std::byte> unaligned = std::span(whole).subspan(1);
    const std::size_t overflows = encode_floats(dtype, values, unaligned);
    std::vector<float> decoded(values.size());
    decode_floats(dtype, unaligned, decoded);
    std::size_t sum = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::vector<std::byte> one(size);
      sum += encode_floats(dtype, std::span(values).subspan(i, 1), one);
      ASSERT_EQ(std::memcmp(one.data(), unaligned.data() + i * size, size), 0) << values[i];
      float back = 0;
      decode_floats(dtype, one, std::span(&back, 1));
      ASSERT_EQ(std::bit_cast<std::uint32_t>(back), std::bit_cast<std::uint32_t>(decoded[i]));
    }
    EXPECT_EQ(sum, overflows);
    EXPECT_EQ(overflows > 0, dtype == DType::f16);
  }
}

TEST(DType, SpecialValues) {
  const std::vector<float> values = {0.0F,     -0.0F,     1.0F,     -2.0F,    kInfinity, -kInfinity,
                                     65504.0F, 65519.99F, 0x1p-24F, 0x1p-25F, 0x1p-149F, 3.0e-8F};
  EXPECT_EQ(
      encode16(DType::f16, values).stored,
      (std::vector<std::uint16_t>{0, 0x8000, 0x3c00, 0xc000, 0x7c00, 0xfc00, 0x7bff, 0x7bff, 1, 0, 0, 1}));
  EXPECT_EQ(encode16(DType::f16, values).overflows, 0U);
  EXPECT_EQ(encode16(DType::bf16, {1.0F, -2.0F, kInfinity, -0.0F, 1.00390625F, 1.01171875F}).stored,
            (std::vector<std::uint16_t>{0x3f80, 0xc000, 0x7f80, 0x8000, 0x3f80, 0x3f82}));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // A NaN whose payload lies only in the bits that are cut must not turn into an infinity.
  const auto sly = std::bit_cast<float>(0x7f800001U);
  for (const DType dtype : {DType::bf16, DType::f16, DType::f64}) {
    std::vector<std::byte> bytes(2 * size_of(dtype));
    EXPECT_EQ(encode_floats(dtype, std::vector<float>{nan, sly}, bytes), 0U);
    std::vector<float> back(2);
    decode_floats(dtype, bytes, back);
    EXPECT_TRUE(std::isnan(back[0]));
    EXPECT_TRUE(std::isnan(back[1]));
  }
}

TEST(DType, CountsFiniteValuesThatBecomeInfinite) {
  const float largest = std::numeric_limits<float>::max();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> values = {65520.0F,   -65520.0F, 1e10F, -largest, 65519.0F, kInfinity,
                                     -kInfinity, nan,       1.0F,  -1e6F,    0.0F};
  const Encoded half = encode16(DType::f16, values);
  EXPECT_EQ(half.overflows, 5U);
  EXPECT_EQ(half.stored[0], 0x7c00);
  EXPECT_EQ(half.stored[1], 0xfc00);
  EXPECT_EQ(encode16(DType::bf16, values).overflows, 1U);
  EXPECT_EQ(encode16(DType::bf16, {-largest}).stored[0], 0xff80);
  EXPECT_EQ(encode16(DType::bf16, {std::bit_cast<float>(0x7f7f7fffU)}).overflows, 0U);
  std::vector<double> wide(values.size());
  EXPECT_EQ(encode_floats(DType::f64, values, std::as_writable_bytes(std::span(wide))), 0U);
  EXPECT_EQ(wide[3], -static_cast<double>(largest));
}

TEST(DType, WideTypes) {
  EXPECT_EQ(decode(DType::f64, std::vector<double>{0.1, -1e300, 1e-320}),
            (std::vector<float>{0.1F, -kInfinity, 0.0F}));
  const std::vector<float> values = {0.1F, -3.5F, 0x1p-149F};
  EXPECT_EQ(decode(DType::f32, values), values);
}

TEST(DType, RoundedIsWhatIsRead) {
  EXPECT_EQ(rounded(DType::bf16, 1.0F + 0x1p-9F), 1.0F);
  EXPECT_EQ(rounded(DType::bf16, 1.0F + 0x1p-8F), 1.0F);  // to even
  EXPECT_EQ(rounded(DType::bf16, 1.0F + 0x1.8p-8F), 1.0F + 0x1p-7F);
  EXPECT_EQ(rounded(DType::bf16, 1.0F + 3 * 0x1p-8F), 1.0F + 0x1p-6F);
  EXPECT_EQ(rounded(DType::f16, 1.0F + 0x1p-11F), 1.0F);
  EXPECT_EQ(rounded(DType::f16, 1.0F + 0x1.8p-11F), 1.0F + 0x1p-10F);
  EXPECT_EQ(rounded(DType::f16, 0x1p-26F), 0.0F);
  EXPECT_EQ(rounded(DType::f16, 65519.0F), 65504.0F);
  EXPECT_EQ(rounded(DType::f16, -65520.0F), -kInfinity);
  EXPECT_EQ(rounded(DType::bf16, std::numeric_limits<float>::max()), kInfinity);
  for (const float value : {0.1F, -3.5F, 0x1p-149F, std::numeric_limits<float>::max(), -kInfinity}) {
    EXPECT_EQ(rounded(DType::f32, value), value);
    EXPECT_EQ(rounded(DType::f64, value), value);
  }
  for (const DType dtype : {DType::bf16, DType::f16}) {
    EXPECT_TRUE(std::isnan(rounded(dtype, std::numeric_limits<float>::quiet_NaN())));
    EXPECT_TRUE(std::signbit(rounded(dtype, -0.0F)));
  }
  EXPECT_THROW(rounded(DType::i32, 1.0F), std::invalid_argument);
}

TEST(DType, RefusesWrongSizesAndTypes) {
  std::vector<std::byte> bytes(8);
  std::vector<float> values(3);
  EXPECT_THROW(decode_floats(DType::f16, bytes, values), std::invalid_argument);
  EXPECT_THROW(encode_floats(DType::f16, values, bytes), std::invalid_argument);
  EXPECT_THROW(decode_floats(DType::f16, std::span(bytes).first(7), values), std::invalid_argument);
  EXPECT_THROW(decode_floats(DType::i8, std::span(bytes).first(3), values), std::invalid_argument);
  EXPECT_THROW(encode_floats(DType::u16, values, std::span(bytes).first(6)), std::invalid_argument);
  EXPECT_NO_THROW(decode_floats(DType::bf16, {}, {}));
  EXPECT_EQ(encode_floats(DType::f16, {}, {}), 0U);
}

}  // namespace
}  // namespace relatent
