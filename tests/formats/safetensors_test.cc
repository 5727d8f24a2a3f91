#include "formats/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::bytes_of;
using testing_support::expect_error;
using testing_support::read_bytes;
using testing_support::TempFolder;
using testing_support::text_of;

std::string prefix(std::uint64_t length) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes;
}

std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string data(data_bytes, '\0');
  for (std::size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<char>('a' + i % 26);
  }
  return prefix(header.size()) + header + data;
}

constexpr const char* kGoodHeader =
    R"({"__metadata__":{"format":"pt","note":"é"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("a":{"data_offsets":[24,27],"shape":[3],"dtype":"U8"},"e":{"dtype":"BF16","shape":[0,5],"data_offsets":[27,27]},)"
    R"("s":{"dtype":"F16","shape":[],"data_offsets":[27,29]}}   )";

TEST(SafetensorsFile, ReadsAHandMadeFile) {
  const TempFolder folder;
  const std::string bytes = file_of(kGoodHeader, 29);
  const std::filesystem::path path = folder.write("a.safetensors", bytes);
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(file.header_text(), kGoodHeader);
  EXPECT_EQ(file.file_bytes(), bytes.size());
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"note", "é"}}));
  ASSERT_EQ(file.tensors().size(), 4U);
  const std::size_t data = 8 + std::strlen(kGoodHeader);

  const TensorInfo& b = file.tensors()[0];
  EXPECT_EQ(b.name, "b");
  EXPECT_EQ(b.dtype, DType::f32);
  EXPECT_EQ(b.shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(b.offset, data);
  EXPECT_EQ(b.bytes, 24U);
  EXPECT_EQ(text_of(file.bytes(b)), "abcdefghijklmnopqrstuvwx");

  EXPECT_EQ(file.tensors()[1].name, "a");
  EXPECT_EQ(text_of(file.bytes(file.tensors()[1])), "yza");
  EXPECT_EQ(file.tensors()[2].name, "e");
  EXPECT_TRUE(file.bytes(file.tensors()[2]).empty());
  EXPECT_EQ(file.tensors()[3].name, "s");
  EXPECT_TRUE(file.tensors()[3].shape.empty());
  EXPECT_EQ(file.tensors()[3].bytes, 2U);

  EXPECT_EQ(file.find("a"), &file.tensors()[1]);
  EXPECT_EQ(file.find("missing"), nullptr);
  file.release(b);
  EXPECT_EQ(text_of(file.bytes(b)), "abcdefghijklmnopqrstuvwx");
  EXPECT_THROW(file.bytes({.name = "x", .shape = {}, .offset = bytes.size() - 1, .bytes = 2}),
               std::invalid_argument);
}

struct Case {
  std::string header;
  std::size_t data_bytes;
  std::vector<std::string> parts;
};

TEST(SafetensorsFile, TakesUnusualButValidHeaders) {
  const TempFolder folder;
  const std::vector<Case> cases = {
      {"{}", 0, {}},
      {R"({"__metadata__":{}})", 0, {}},
      {R"({"e":{"dtype":"F64","shape":[3,0,9],"data_offsets":[0,0]}})", 0, {"e"}},
      // Order of data, not of the header; an empty tensor between two others.
      {R"({"z":{"dtype":"I8","shape":[2],"data_offsets":[3,5]},"e":{"dtype":"I8","shape":[0],"data_offsets":[3,3]},)"
       R"("y":{"dtype":"I8","shape":[1,3],"data_offsets":[0,3]}})",
       5,
       {"y", "e", "z"}},
      {R"({"":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}})", 1, {""}},
      {R"({"\u00e9\n":{"dtype":"F8_E4M3","shape":[1,1,1,1,1,1],"data_offsets":[0,1]}})", 1, {"é\n"}},
      {"{\t\"t\" :\n{\"dtype\": \"U64\", \"shape\": [ ], \"data_offsets\": [0, 8]}}\r\n", 8, {"t"}},
  };
  for (const Case& test : cases) {
    const SafetensorsFile file =
        SafetensorsFile::open(folder.write("a.safetensors", file_of(test.header, test.data_bytes)));
    std::vector<std::string> names;
    for (const TensorInfo& tensor : file.tensors()) {
      names.push_back(tensor.name);
    }
    EXPECT_EQ(names, test.parts) << test.header;
  }
}

// Of one tensor, w.
std::string one(const std::string& entry) {
  return "{\"w\":" + entry + "}";
}

std::string shaped(const std::string& shape, const std::string& offsets) {
  return one(R"({"dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}");
}

void expect_refused(const std::vector<Case>& cases) {
  const TempFolder folder;
  for (const Case& test : cases) {
    SCOPED_TRACE(test.header.substr(0, 200));
    std::vector<std::string> parts = test.parts;
    parts.emplace_back("a.safetensors: ");
    expect_error(ErrorKind::input, parts, [&] {
      SafetensorsFile::open(folder.write("a.safetensors", file_of(test.header, test.data_bytes)));
    });
  }
}

TEST(SafetensorsFile, RefusesBadJsonAndMetadata) {
  expect_refused({
      // JSON
      {"", 0, {"begins with {", "an empty header"}},
      {" {}", 0, {"begins with {"}},
      {"\xef\xbb\xbf{}", 0, {"begins with {"}},
      {"[]", 0, {"begins with {"}},
      {"{", 0, {"not valid JSON", "byte"}},
      {"{} {}", 0, {"not valid JSON"}},
      {std::string("{}\0\0", 4), 0, {"a NUL at byte 3"}},
      {"{\"\xff\":{}}", 0, {"not valid JSON"}},
      {std::string(100'000, '{'), 0, {"not valid JSON"}},
      {R"({"w":)" + std::string(100'000, '['), 0, {"tensor w", "expected an object", "found an array"}},
      // duplicates
      {R"({"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
       0,
       {"tensor w", "appears twice"}},
      {one(R"({"dtype":"U8","shape":[0],"data_offsets":[0,0],"shape":[0]})"),
       0,
       {"tensor w", "\"shape\"", "twice"}},
      {R"({"__metadata__":{"a":"1","a":"1"}})", 0, {"\"a\"", "twice"}},
      {R"({"__metadata__":{},"__metadata__":{}})", 0, {"twice"}},
      // metadata
      {R"({"__metadata__":{"a":1}})", 0, {"metadata \"a\"", "expected a string", "found 1"}},
      {R"({"__metadata__":{"a":{}}})", 0, {"metadata \"a\"", "found an object"}},
      {R"({"__metadata__":{"a":null}})", 0, {"metadata \"a\"", "found null"}},
      {R"({"__metadata__":"a"})", 0, {"expected an object", "found \"a\""}},
  });
}

TEST(SafetensorsFile, RefusesEntriesThatDescribeNoTensor) {
  expect_refused({
      // entries
      {one("1"), 0, {"tensor w", "expected an object", "found 1"}},
      {one("null"), 0, {"tensor w", "found null"}},
      {one("{}"), 0, {"tensor w", "incomplete", "found 0 of them"}},
      {one(R"({"dtype":"F32","shape":[]})"), 0, {"tensor w", "incomplete", "data_offsets"}},
      {one(R"({"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1})"),
       4,
       {"tensor w", "unknown field", "found x"}},
      {one(R"({"dtype":"F33","shape":[],"data_offsets":[0,4]})"),
       4,
       {"tensor w", "unknown dtype", "found F33"}},
      {one(R"({"dtype":"f32","shape":[],"data_offsets":[0,4]})"),
       4,
       {"tensor w", "unknown dtype", "found f32"}},
      {one(R"({"dtype":3,"shape":[],"data_offsets":[0,4]})"), 4, {"tensor w", "dtype", "found 3"}},
      {one(R"({"dtype":["F32"],"shape":[],"data_offsets":[0,4]})"),
       4,
       {"tensor w", "dtype", "found an array"}},
      {shaped("4", "[0,4]"), 4, {"tensor w", "shape", "non-negative integers", "found 4"}},
      {shaped("[-1]", "[0,4]"), 4, {"tensor w", "shape", "non-negative integers", "found -1"}},
      {shaped("[1.0]", "[0,4]"), 4, {"tensor w", "shape", "found 1.0"}},
      {shaped("[1e0]", "[0,4]"), 4, {"tensor w", "shape", "found 1e0"}},
      {shaped("[true]", "[0,4]"), 4, {"tensor w", "shape", "found true"}},
      {shaped("[\"1\"]", "[0,4]"), 4, {"tensor w", "shape", "found \"1\""}},
      {shaped("[[1]]", "[0,4]"), 4, {"tensor w", "shape", "found an array"}},
      {shaped("{\"a\":1}", "[0,4]"), 4, {"tensor w", "shape", "found an object"}},
      {shaped("[9223372036854775808]", "[0,4]"), 4, {"tensor w", "shape", "found 9223372036854775808"}},
      {shaped("[1]", "[0]"), 4, {"tensor w", "data_offsets", "two", "found 1 numbers"}},
      {shaped("[1]", "[]"), 4, {"tensor w", "data_offsets", "found 0 numbers"}},
      {shaped("[1]", "[0,4,4]"), 4, {"tensor w", "data_offsets", "found a third number"}},
      {shaped("[1]", "[4,0]"), 4, {"tensor w", "data_offsets", "before the end", "[4, 0]"}},
      {shaped("[1]", "[0,18446744073709551616]"), 4, {"tensor w", "data_offsets", "18446744073709551616"}},
      {shaped("[1]", "[-4,0]"), 4, {"tensor w", "data_offsets", "found -4"}},
      {shaped("[1]", "\"0,4\""), 4, {"tensor w", "data_offsets"}},
  });
}

TEST(SafetensorsFile, RefusesTensorsThatDoNotFillTheData) {
  expect_refused({
      // byte counts
      {shaped("[3,2]", "[0,20]"),
       20,
       {"tensor w", "expected 24 bytes for F32 [3, 2]", "found 20 in [0, 20]"}},
      {shaped("[4611686018427387904]", "[0,0]"),
       0,
       {"tensor w", "shape", "below 2^64", "4611686018427387904"}},
      {shaped("[4294967296,4294967296]", "[0,0]"), 0, {"tensor w", "shape", "below 2^64"}},
      {shaped("[9223372036854775807,9223372036854775807,0]", "[0,0]"), 0, {"tensor w", "below 2^64"}},
      {shaped("[1]", "[18446744073709551612,18446744073709551615]"), 4, {"tensor w", "expected 4 bytes"}},
      // layout
      {shaped("[1]", "[4,8]"), 8, {"tensor w", "unused bytes", "from byte 0", "found 4"}},
      {shaped("[1]", "[0,4]"), 3, {"tensor w", "truncated", "up to byte 4", "found 3 bytes"}},
      {shaped("[1]", "[0,4]"), 5, {"bytes after the last tensor", "expected 4", "found 5"}},
      {"{}", 1, {"bytes after the last tensor", "expected 0", "found 1"}},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})",
       5,
       {"tensor w", "overlaps", "from byte 4", "found 3"}},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
       4,
       {"tensor w", "overlaps", "from byte 4", "found 0"}},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})",
       4,
       {"tensor w", "overlaps"}},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})",
       5,
       {"tensor w", "unused bytes", "from byte 2", "found 3"}},
  });
}

TEST(SafetensorsFile, RefusesABadPrefix) {
  const TempFolder folder;
  const auto open = [&](const std::string& bytes) {
    return [&folder, bytes] { SafetensorsFile::open(folder.write("a.safetensors", bytes)); };
  };
  expect_error(ErrorKind::input, {"a.safetensors", "at least 8 bytes", "found 0"}, open(""));
  expect_error(ErrorKind::input, {"a.safetensors", "at least 8 bytes", "found 7"}, open("1234567"));
  expect_error(ErrorKind::input, {"header of 3 bytes", "found 2"}, open(prefix(3) + "{}"));
  expect_error(ErrorKind::input, {"at most 100000000", "found 100000001"}, open(prefix(100'000'001) + "{}"));
  expect_error(ErrorKind::input, {"truncated", "100000000"}, open(prefix(100'000'000) + "{}"));
  expect_error(ErrorKind::input, {"at most", "found 18446744073709551615"}, open(prefix(~0ULL) + "{}"));
  expect_error(ErrorKind::input, {"missing.safetensors", "cannot open"},
               [&] { SafetensorsFile::open(folder / "missing.safetensors"); });
}

TEST(SafetensorsFile, RefusesEveryCut) {
  const TempFolder folder;
  const std::string bytes = file_of(kGoodHeader, 29);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    expect_error(ErrorKind::input, {"a.safetensors: "},
                 [&] { SafetensorsFile::open(folder.write("a.safetensors", bytes.substr(0, size))); });
    // The same with a prefix that admits to it.
    if (size >= 8 && size < 8 + std::strlen(kGoodHeader)) {
      expect_error(ErrorKind::input, {"a.safetensors: "}, [&] {
        SafetensorsFile::open(folder.write("a.safetensors", prefix(size - 8) + bytes.substr(8, size - 8)));
      });
    }
  }
}

TEST(SafetensorsFile, SurvivesEveryFlippedByte) {
  const TempFolder folder;
  const std::string bytes = file_of(kGoodHeader, 29);
  std::mt19937 random(11);
  for (std::size_t at = 0; at < 8 + std::strlen(kGoodHeader); ++at) {
    for (int repetition = 0; repetition < 6; ++repetition) {
      std::string damaged = bytes;
      const auto mask = repetition == 0 ? 0xffU : 1 + random() % 255;
      damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ mask);
      try {
        // What is still valid can be read to its last byte.
        const SafetensorsFile file = SafetensorsFile::open(folder.write("a.safetensors", damaged));
        std::size_t sum = 0;
        for (const TensorInfo& tensor : file.tensors()) {
          sum += text_of(file.bytes(tensor)).size();
        }
        EXPECT_EQ(sum, 29U);
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::input);
      }
    }
  }
}

TEST(SafetensorsWriter, GoldenBytes) {
  const TempFolder folder;
  SafetensorsWriter writer(folder / "a.safetensors", {{"b", DType::bf16, {2, 1}}, {"q\"é", DType::u8, {}}});
  writer.write("q\"é", bytes_of("!"));
  writer.write("b", bytes_of("wxyz"));
  EXPECT_FALSE(std::filesystem::exists(folder / "a.safetensors"));
  writer.finish();
  std::string header =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},)"
      R"("q\"é":{"dtype":"U8","shape":[],"data_offsets":[4,5]}})";
  header.append((8 - header.size() % 8) % 8, ' ');
  const std::string expected = prefix(header.size()) + header + "wxyz!";
  EXPECT_EQ(read_bytes(folder / "a.safetensors"), expected);
  EXPECT_EQ(writer.file_bytes(), expected.size());
}

TEST(SafetensorsWriter, RoundTripsEveryDType) {
  const TempFolder folder;
  std::mt19937 random(5);
  std::vector<TensorSpec> specs;
  std::vector<std::string> contents;
  for (int i = 0; i < 15; ++i) {
    specs.push_back({"t" + std::to_string(i), static_cast<DType>(i), {i % 4, 3 + i, 2}});
    std::string content(specs.back().bytes(), '\0');
    for (char& byte : content) {
      byte = static_cast<char>(random());
    }
    contents.push_back(content);
  }
  SafetensorsWriter writer(folder / "a.safetensors", specs);
  for (std::size_t i = specs.size(); i-- > 0;) {
    writer.write(specs[i].name, bytes_of(contents[i]));
  }
  writer.finish();

  const SafetensorsFile file = SafetensorsFile::open(folder / "a.safetensors");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  ASSERT_EQ(file.tensors().size(), specs.size());
  SafetensorsWriter copier(folder / "b.safetensors", specs);
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const TensorInfo* tensor = file.find(specs[i].name);
    ASSERT_NE(tensor, nullptr);
    EXPECT_EQ(tensor->dtype, specs[i].dtype);
    EXPECT_EQ(tensor->shape, specs[i].shape);
    EXPECT_EQ(text_of(file.bytes(*tensor)), contents[i]);
    copier.copy(specs[i].name, file, *tensor);
  }
  copier.finish();
  EXPECT_EQ(read_bytes(folder / "a.safetensors"), read_bytes(folder / "b.safetensors"));
}

TEST(SafetensorsWriter, MetadataComesBehindTheFormat) {
  const TempFolder folder;
  SafetensorsWriter writer(folder / "a.safetensors", {}, {{"b", "é\"\n"}, {"a", "1"}});
  writer.finish();
  const SafetensorsFile file = SafetensorsFile::open(folder / "a.safetensors");
  EXPECT_TRUE(file.header_text().starts_with(R"({"__metadata__":{"format":"pt","a":"1","b":"é\"\n"}})"));
  EXPECT_EQ(file.metadata(),
            (std::map<std::string, std::string>{{"format", "pt"}, {"a", "1"}, {"b", "é\"\n"}}));
  const auto make = [&](const std::map<std::string, std::string>& metadata) {
    const SafetensorsWriter bad(folder / "b.safetensors", {}, metadata);
  };
  EXPECT_THROW(make({{"format", "np"}}), std::invalid_argument);
  EXPECT_THROW(make({{"a", "\xff"}}), std::invalid_argument);
}

TEST(TensorSlice, RunsCoverTheSlice) {
  const std::vector<std::int64_t> shape = {2, 3, 4};
  const auto expect = [&](const TensorSlice& slice, const std::vector<std::int64_t>& sliced,
                          const SliceRuns& runs) {
    EXPECT_EQ(shape_of(slice, shape), sliced);
    const SliceRuns found = runs_of(slice, DType::f16, shape);
    EXPECT_EQ(found.count, runs.count);
    EXPECT_EQ(found.first, runs.first);
    EXPECT_EQ(found.stride, runs.stride);
    EXPECT_EQ(found.length, runs.length);
  };
  expect({0, 1, 1}, {1, 3, 4}, {1, 24, 48, 24});
  expect({1, 1, 2}, {2, 2, 4}, {2, 8, 24, 16});
  expect({2, 3, 1}, {2, 3, 1}, {6, 6, 8, 2});
  expect({2, 4, 0}, {2, 3, 0}, {6, 8, 8, 0});
  for (const TensorSlice& slice :
       {TensorSlice{3, 0, 1}, TensorSlice{0, -1, 1}, TensorSlice{0, 0, -1}, TensorSlice{0, 0, 3},
        TensorSlice{1, 3, 1}, TensorSlice{1, 4, 0}, TensorSlice{1, INT64_MAX, INT64_MAX}}) {
    EXPECT_THROW(shape_of(slice, shape), std::invalid_argument);
    EXPECT_THROW(runs_of(slice, DType::f16, shape), std::invalid_argument);
  }
}

TEST(SafetensorsWriter, CopiesSlices) {
  const TempFolder folder;
  const SafetensorsFile source = SafetensorsFile::open(folder.write(
      "a.safetensors", file_of(R"({"m":{"dtype":"I16","shape":[3,4],"data_offsets":[0,24]}})", 24)));
  const TensorInfo& m = source.tensors()[0];
  SafetensorsWriter writer(folder / "b.safetensors", {{"rows", DType::i16, {2, 4}},
                                                      {"columns", DType::i16, {3, 2}},
                                                      {"none", DType::i16, {0, 4}},
                                                      {"all", DType::i16, {3, 4}}});
  writer.copy_slice("all", source, m, {1, 0, 4});
  writer.copy_slice("columns", source, m, {1, 1, 2});
  writer.copy_slice("rows", source, m, {0, 1, 2});
  EXPECT_THROW(writer.copy_slice("none", source, m, {0, 1, 2}), std::invalid_argument);
  EXPECT_THROW(writer.copy_slice("none", source, m, {0, 3, 1}), std::invalid_argument);
  EXPECT_THROW(writer.copy_slice("rows", source, m, {0, 1, 2}), std::invalid_argument);
  writer.copy_slice("none", source, m, {0, 3, 0});
  writer.finish();
  const SafetensorsFile copy = SafetensorsFile::open(folder / "b.safetensors");
  const auto text = [&](const char* name) { return text_of(copy.bytes(*copy.find(name))); };
  EXPECT_EQ(text("rows"), "ijklmnopqrstuvwx");
  EXPECT_EQ(text("columns"), "cdefklmnstuv");
  EXPECT_EQ(text("none"), "");
  EXPECT_EQ(text("all"), "abcdefghijklmnopqrstuvwx");
}

TEST(SafetensorsWriter, WritesAnEmptyFile) {
  const TempFolder folder;
  SafetensorsWriter writer(folder / "a.safetensors", {});
  writer.finish();
  EXPECT_TRUE(SafetensorsFile::open(folder / "a.safetensors").tensors().empty());
  EXPECT_EQ(writer.file_bytes() % 8, 0U);
}

TEST(SafetensorsWriter, RefusesMisuse) {
  const TempFolder folder;
  const auto make = [&](const std::vector<TensorSpec>& specs) {
    const SafetensorsWriter writer(folder / "a.safetensors", specs);
  };
  EXPECT_THROW(make({{"a", DType::u8, {1}}, {"a", DType::u8, {2}}}), std::invalid_argument);
  EXPECT_THROW(make({{"__metadata__", DType::u8, {1}}}), std::invalid_argument);
  EXPECT_THROW(make({{"a", DType::u8, {-1}}}), std::invalid_argument);
  EXPECT_THROW(make({{"a", DType::f32, {1LL << 62}}}), std::invalid_argument);
  EXPECT_THROW(make({{"a", DType::u8, {1LL << 62, 3}}, {"b", DType::u8, {1LL << 62, 3}}}),
               std::invalid_argument);
  EXPECT_THROW(make({{"\xff", DType::u8, {1}}}), std::invalid_argument);
  expect_error(ErrorKind::machine, {"a.safetensors.partial", "cannot reserve"}, [&] {
    make({{"a", DType::u8, {1LL << 61}}});
  });
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  expect_error(ErrorKind::machine, {"no/a.safetensors.partial"},
               [&] { const SafetensorsWriter writer(folder / "no/a.safetensors", {}); });

  const std::filesystem::path other =
      folder.write("b.safetensors", file_of(R"({"a":{"dtype":"I8","shape":[2,1],"data_offsets":[0,2]}})", 2));
  const SafetensorsFile source = SafetensorsFile::open(other);
  SafetensorsWriter writer(folder / "a.safetensors", {{"a", DType::u8, {2, 1}}, {"b", DType::i8, {1, 2}}});
  EXPECT_THROW(writer.write("a", bytes_of("x")), std::invalid_argument);
  EXPECT_THROW(writer.write("c", bytes_of("x")), std::invalid_argument);
  EXPECT_THROW(writer.copy("a", source, source.tensors()[0]), std::invalid_argument);
  EXPECT_THROW(writer.copy("b", source, source.tensors()[0]), std::invalid_argument);
  writer.write("a", bytes_of("xy"));
  EXPECT_THROW(writer.write("a", bytes_of("xy")), std::invalid_argument);
  try {
    writer.finish();
    ADD_FAILURE() << "an unfinished file was finished";
  } catch (const std::logic_error& error) {
    EXPECT_NE(std::string(error.what()).find("tensor b "), std::string::npos) << error.what();
  }
  writer.write("b", bytes_of("zz"));
  writer.finish();
  EXPECT_EQ(SafetensorsFile::open(folder / "a.safetensors").tensors().size(), 2U);
}

TEST(ShapeText, ListsDimensions) {
  EXPECT_EQ(shape_text({}), "[]");
  EXPECT_EQ(shape_text({7}), "[7]");
  EXPECT_EQ(shape_text({512, 0, 64}), "[512, 0, 64]");
}

}  // namespace
}  // namespace relatent
