#include "formats/gguf.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/gguf_bytes.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::TempFolder;
using testing_support::text_of;
using testing_support::gguf_bytes::good;
using testing_support::gguf_bytes::key;
using testing_support::gguf_bytes::letters;
using testing_support::gguf_bytes::Made;
using testing_support::gguf_bytes::raw;
using testing_support::gguf_bytes::tensor;
using testing_support::gguf_bytes::text;
using testing_support::gguf_bytes::u32;
using testing_support::gguf_bytes::u64;

TEST(GgufFile, ReadsAHandMadeFile) {
  const TempFolder folder;
  const Made made = good();
  const std::filesystem::path path = folder.write("a.gguf", made.bytes());
  const GgufFile file = GgufFile::open(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(file.file_bytes(), made.bytes().size());
  EXPECT_EQ(file.alignment(), 32U);

  const GgufMetadata expected = {{"general.architecture", std::string("deepseek2")},
                                 {"a.u8", std::uint8_t{200}},
                                 {"a.i8", std::int8_t{-100}},
                                 {"a.u16", std::uint16_t{60000}},
                                 {"a.i16", std::int16_t{-30000}},
                                 {"a.u32", std::uint32_t{4'000'000'000U}},
                                 {"a.i32", std::int32_t{-2'000'000'000}},
                                 {"a.f32", 0.25F},
                                 {"a.bool", true},
                                 {"a.u64", ~std::uint64_t{0}},
                                 {"a.i64", std::numeric_limits<std::int64_t>::min()},
                                 {"a.f64", 1e300},
                                 {"b.empty", std::vector<std::string>{}},
                                 {"b.strings", std::vector<std::string>{"Ġa", ""}},
                                 {"b.i32", std::vector<std::int32_t>{1, -2, 3}},
                                 {"b.f32", std::vector<float>{-1.5F}},
                                 {"b.u32", std::vector<std::uint32_t>{7}},
                                 {"b.bool", std::vector<bool>{true, false}}};
  EXPECT_EQ(file.metadata(), expected);

  ASSERT_EQ(file.tensors().size(), 3U);
  const GgufTensor& embedding = file.tensors()[0];
  EXPECT_EQ(embedding.name, "token_embd.weight");
  EXPECT_EQ(embedding.dtype, DType::f32);
  EXPECT_EQ(embedding.dims, (std::vector<std::int64_t>{3, 2}));
  EXPECT_EQ(embedding.shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(embedding.bytes, 24U);
  EXPECT_EQ(embedding.offset % 32, 0U);
  EXPECT_EQ(text_of(file.bytes(embedding)), letters(24));
  EXPECT_EQ(file.tensors()[1].dtype, DType::f16);
  EXPECT_EQ(text_of(file.bytes(file.tensors()[1])), letters(10));
  EXPECT_EQ(file.tensors()[2].dtype, DType::bf16);
  EXPECT_EQ(file.tensors()[2].shape, (std::vector<std::int64_t>{4, 3, 2, 1}));
  EXPECT_EQ(text_of(file.bytes(file.tensors()[2])), letters(48));

  EXPECT_EQ(file.find_tensor("norm"), &file.tensors()[1]);
  EXPECT_EQ(file.find_tensor("missing"), nullptr);
  file.release(embedding);
  EXPECT_EQ(text_of(file.bytes(embedding)), letters(24));
  TensorInfo foreign;
  foreign.offset = made.bytes().size() - 1;
  foreign.bytes = 2;
  EXPECT_THROW(file.bytes(foreign), std::invalid_argument);
}

TEST(GgufFile, GivesValuesOfTheTypeThatWasAskedFor) {
  const TempFolder folder;
  const GgufFile file = GgufFile::open(folder.write("a.gguf", good().bytes()));
  EXPECT_EQ(*file.find_as<std::uint32_t>("a.u32"), 4'000'000'000U);
  EXPECT_EQ(file.find_as<std::uint32_t>("missing"), nullptr);
  EXPECT_EQ(file.get<std::string>("general.architecture"), "deepseek2");
  EXPECT_EQ(file.get<std::vector<std::string>>("b.strings").size(), 2U);
  EXPECT_EQ(file.find("missing"), nullptr);
  EXPECT_EQ(gguf_type_name(*file.find("a.f64")), "f64");
  expect_error(ErrorKind::input, {"a.gguf: ", "key \"a.u64\"", "expected u32", "found u64"},
               [&] { file.find_as<std::uint32_t>("a.u64"); });
  expect_error(ErrorKind::input, {"key \"b.i32\"", "expected string", "found array of i32"},
               [&] { file.get<std::string>("b.i32"); });
  expect_error(ErrorKind::input, {"key \"missing\"", "expected f32", "no such key"},
               [&] { file.get<float>("missing"); });
}

TEST(GgufFile, TakesUnusualButValidFiles) {
  const TempFolder folder;
  const auto open = [&](const std::string& bytes) { return GgufFile::open(folder.write("a.gguf", bytes)); };
  // Nothing in it, with and without the padding.
  EXPECT_TRUE(open(Made{}.header()).tensors().empty());
  EXPECT_TRUE(open(Made{}.bytes()).metadata().empty());
  // The last padding is there or not.
  const Made padded = {.tensors = {tensor("a", {1}, 0, 0)}, .data = letters(4)};
  EXPECT_EQ(text_of(open(padded.bytes()).bytes(open(padded.bytes()).tensors()[0])), "abcd");
  EXPECT_EQ(open(padded.bytes() + std::string(28, '\0')).tensors().size(), 1U);
  // Another alignment.
  for (const std::size_t alignment : {1U, 8U, 4096U}) {
    Made made = {.keys = {key("general.alignment", 4, u32(static_cast<std::uint32_t>(alignment)))},
                 .tensors = {tensor("a", {3}, 30, 0),
                             tensor("b", {2}, 0, (6 + alignment - 1) / alignment * alignment)},
                 .alignment = alignment};
    made.data = letters(6);
    made.data.resize((6 + alignment - 1) / alignment * alignment);
    made.data += "ABCDEFGH";
    const GgufFile file = open(made.bytes());
    EXPECT_EQ(file.alignment(), alignment);
    EXPECT_EQ(text_of(file.bytes(file.tensors()[1])), "ABCDEFGH");
  }
  const std::string longest(63, 'n');
  EXPECT_EQ(open(Made{.tensors = {tensor(longest, {1}, 0, 0)}, .data = letters(4)}.bytes()).tensors()[0].name,
            longest);
}

struct Case {
  Made made;
  std::vector<std::string> parts;
};

TEST(GgufFile, RefusesWhatItsHeaderMayNotSay) {
  const auto keyed = [](const std::string& entry) { return Made{.keys = {entry}}; };
  const auto one = [](const std::string& entry, std::size_t data = 4) {
    return Made{.tensors = {entry}, .data = letters(data)};
  };
  const std::string quantised = "dequantised";
  const std::vector<Case> cases = {
      // versions
      {{.version = 1}, {"expected GGUF version 3", "found version 1"}},
      {{.version = 2}, {"expected GGUF version 3", "found version 2"}},
      {{.version = 4}, {"found version 4"}},
      {{.version = 0}, {"found version 0"}},
      {{.version = 0x03000000}, {"expected a little-endian", "found a big-endian"}},
      {{.version = 0x02000000}, {"found a big-endian"}},
      // keys
      {keyed(key("", 4, u32(1))), {"key 0 is empty"}},
      {{.keys = {key("a", 4, u32(1)), key("a", 8, text("x"))}}, {"key \"a\" appears twice"}},
      {keyed(key("a", 13, u64(0))), {"key \"a\"", "expected a value type", "found 13"}},
      {keyed(key("a", ~0U, u64(0))), {"key \"a\"", "found 4294967295"}},
      {keyed(key("a", 7, raw(std::uint8_t{2}))), {"key \"a\"", "a bool of 0 or 1", "found 2"}},
      {keyed(key("a", 9, u32(7) + u64(1) + "\xff")), {"key \"a\"", "a bool of 0 or 1", "found 255"}},
      {keyed(key("a", 9, u32(9) + u64(1) + u32(4) + u64(0))), {"key \"a\"", "found an array of arrays"}},
      {keyed(key("a", 9, u32(13) + u64(0))), {"key \"a\"", "found 13"}},
      {keyed(key("a", 9, u32(4) + u64(1ULL << 62U))), {"truncated", "4611686018427387904 elements"}},
      {keyed(key("a", 9, u32(8) + u64(5))), {"truncated", "5 elements", "found 15 bytes"}},
      {keyed(key("a", 9, u32(12) + u64(~0ULL))), {"truncated", "18446744073709551615 elements"}},
      {keyed(key("a", 8, u64(~0ULL))), {"truncated", "18446744073709551615 bytes of a string"}},
      {keyed(u64(~0ULL - 7) + "aaaaaaaaaa"), {"truncated", "bytes of a key"}},
      // alignment
      {keyed(key("general.alignment", 4, u32(0))), {"general.alignment", "a power of two", "found 0"}},
      {keyed(key("general.alignment", 4, u32(48))), {"general.alignment", "a power of two", "found 48"}},
      {keyed(key("general.alignment", 10, u64(32))), {"general.alignment", "expected u32", "found u64"}},
      // names
      {one(tensor("", {1}, 0, 0)), {"without a name"}},
      {one(tensor(std::string("a\0b", 3), {1}, 0, 0)), {"a NUL", "a\\x00b"}},
      {one(tensor(std::string(64, 'n'), {1}, 0, 0)), {"a tensor name of 64 bytes", "1 to 63"}},
      {{.tensors = {tensor("w", {1}, 0, 0), tensor("w", {1}, 0, 32)}, .data = letters(36)},
       {"tensor w", "appears twice"}},
      // dimensions
      {one(tensor("w", {}, 0, 0)), {"tensor w", "expected 1 to 4", "found 0"}},
      {one(tensor("w", {1, 1, 1, 1, 1}, 0, 0)), {"tensor w", "expected 1 to 4", "found 5"}},
      {one(tensor("w", {0}, 0, 0)), {"tensor w", "positive", "found [0]"}},
      {one(tensor("w", {1, ~0ULL}, 0, 0)), {"tensor w", "positive", "found [1, -1]"}},
      {one(tensor("w", {1ULL << 61U}, 0, 0)), {"tensor w", "below 2^63", "2305843009213693952"}},
      {one(tensor("w", {1ULL << 32U, 1ULL << 32U}, 1, 0)), {"tensor w", "below 2^63"}},
      {one(tensor("w", {1ULL << 62U, 4, 1ULL << 62U, 4}, 30, 0)), {"tensor w", "below 2^63"}},
      {one(tensor("w", {1ULL << 60U}, 0, 0)), {"tensor w", "truncated", "4611686018427387904 bytes"}},
      // types
      {one(tensor("w", {256}, 12, 0)), {"tensor w", "quantised", "found Q4_K", quantised}},
      {one(tensor("w", {256}, 8, 0)), {"tensor w", "found Q8_0", quantised}},
      {one(tensor("w", {256}, 39, 0)), {"tensor w", "found MXFP4", quantised}},
      {one(tensor("w", {1}, 26, 0)), {"tensor w", "tensor type", "expected F32, F16 or BF16", "found I32"}},
      {one(tensor("w", {1}, 28, 0)), {"tensor w", "found F64"}},
      {one(tensor("w", {1}, 1000, 0)), {"tensor w", "found type 1000"}},
      // layout
      {one(tensor("w", {1}, 0, 32)), {"tensor w", "offset", "expected 0", "found 32"}},
      {one(tensor("w", {1}, 0, ~0ULL)), {"tensor w", "offset", "found 18446744073709551615"}},
      {one(tensor("w", {1}, 0, 0), 3), {"tensor w", "truncated", "4 bytes of data"}},
      {one(tensor("w", {1}, 0, 0), 33), {"bytes after the last tensor"}},
      {{.tensors = {tensor("v", {1}, 0, 0), tensor("w", {1}, 0, 4)}, .data = letters(8)},
       {"tensor w", "offset", "expected 32", "found 4"}},
      {{.tensors = {tensor("v", {1}, 0, 0), tensor("w", {1}, 0, 0)}, .data = letters(36)},
       {"tensor w", "offset", "expected 32", "found 0"}},
      {{.tensors = {tensor("v", {1}, 0, 0), tensor("w", {1}, 0, 32)}, .data = letters(32)},
       {"tensor w", "truncated"}},
      {{.data = letters(1)}, {"bytes after the last tensor"}},
  };
  const TempFolder folder;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    std::vector<std::string> parts = cases[i].parts;
    parts.emplace_back("a.gguf: ");
    expect_error(ErrorKind::input, parts,
                 [&] { GgufFile::open(folder.write("a.gguf", cases[i].made.bytes())); });
  }
}

TEST(GgufFile, RefusesABadBeginning) {
  const TempFolder folder;
  const auto open = [&](const std::string& bytes) {
    return [&folder, bytes] { GgufFile::open(folder.write("a.gguf", bytes)); };
  };
  expect_error(ErrorKind::input, {"a.gguf", "not a GGUF file", "found an empty file"}, open(""));
  expect_error(ErrorKind::input, {"not a GGUF file", "begins with GGUF"}, open("GGU"));
  expect_error(ErrorKind::input, {"not a GGUF file"}, open("ggjt" + u32(3) + std::string(64, '\0')));
  // Counts that nothing can hold, told before anything is allocated.
  const std::string rest(1000, '\0');
  for (const std::uint64_t count : {std::uint64_t{32}, std::uint64_t{1} << 40U, ~std::uint64_t{0}}) {
    expect_error(ErrorKind::input, {"truncated", std::to_string(count) + " tensors", "found 1000 bytes"},
                 open("GGUF" + u32(3) + u64(count) + u64(0) + rest));
  }
  for (const std::uint64_t count : {std::uint64_t{72}, std::uint64_t{1} << 40U, ~std::uint64_t{0}}) {
    expect_error(ErrorKind::input, {"truncated", std::to_string(count) + " keys", "found 1000 bytes"},
                 open("GGUF" + u32(3) + u64(0) + u64(count) + rest));
  }
  // Counts that are off by one read keys as tensors or the other way round.
  const Made made = good();
  for (const int tensors : {-1, 0, 1}) {
    for (const int keys : {-1, 0, 1}) {
      if (tensors == 0 && keys == 0) {
        continue;
      }
      const std::string bytes =
          "GGUF" + u32(3) + u64(made.tensors.size() + static_cast<std::size_t>(tensors)) +
          u64(made.keys.size() + static_cast<std::size_t>(keys)) + made.bytes().substr(24);
      expect_error(ErrorKind::input, {"a.gguf: "}, open(bytes));
    }
  }
  expect_error(ErrorKind::input, {"missing.gguf", "cannot open"},
               [&] { GgufFile::open(folder / "missing.gguf"); });
}

TEST(GgufFile, RefusesEveryCut) {
  const TempFolder folder;
  const std::string bytes = good().bytes();
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    SCOPED_TRACE(size);
    expect_error(ErrorKind::input, {"a.gguf: "},
                 [&] { GgufFile::open(folder.write("a.gguf", bytes.substr(0, size))); });
  }
}

TEST(GgufFile, SurvivesEveryFlippedByte) {
  const TempFolder folder;
  const Made made = good();
  const std::string bytes = made.bytes();
  std::mt19937 random(11);
  for (std::size_t at = 0; at < made.header().size(); ++at) {
    for (int repetition = 0; repetition < 4; ++repetition) {
      std::string damaged = bytes;
      const auto mask = repetition == 0 ? 0xffU : 1 + random() % 255;
      damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ mask);
      try {
        // What is still valid can be read to its last byte.
        const GgufFile file = GgufFile::open(folder.write("a.gguf", damaged));
        std::size_t sum = 0;
        for (const GgufTensor& one : file.tensors()) {
          sum += text_of(file.bytes(one)).size();
        }
        EXPECT_LE(sum, made.data.size());
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::input);
      }
    }
  }
}

}  // namespace
}  // namespace relatent
