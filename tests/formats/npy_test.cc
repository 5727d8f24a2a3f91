#include "formats/npy.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::read_bytes;
using testing_support::TempFolder;

std::string npy(const std::string& dictionary, const std::string& data, char major = 1) {
  std::string bytes = "\x93NUMPY";
  bytes += major;
  bytes += '\0';
  const auto length = static_cast<std::uint32_t>(dictionary.size());
  std::string prefix(major == 1 ? 2 : 4, '\0');
  std::memcpy(prefix.data(), &length, prefix.size());
  return bytes + prefix + dictionary + data;
}

std::string dictionary(const std::string& descr, std::size_t count) {
  return "{'descr': '" + descr + "', 'fortran_order': False, 'shape': (" + std::to_string(count) +
         ",), }   \n";
}

template <typename T>
std::string data_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

template <typename T>
std::string npy_of(const std::string& descr, const std::vector<T>& values) {
  return npy(dictionary(descr, values.size()), data_of(values));
}

TEST(ReadTokens, GoldenBytes) {
  // What numpy.save writes for numpy.array([1, 258, 65535], dtype='<u2').
  std::string bytes("\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }", 67);
  bytes.append(127 - bytes.size(), ' ');
  bytes += '\n';
  bytes.append("\x01\x00\x02\x01\xff\xff", 6);
  ASSERT_EQ(bytes.size(), 134U);
  const TempFolder folder;
  EXPECT_EQ(read_tokens(folder.write("t.npy", bytes)), (std::vector<std::int32_t>{1, 258, 65535}));
}

TEST(ReadTokens, EveryDTypeAndVersion) {
  const TempFolder folder;
  const std::vector<std::int32_t> expected = {0, 7, 65535, 3};
  const std::vector<std::uint16_t> u2(expected.begin(), expected.end());
  const std::vector<std::int64_t> i8(expected.begin(), expected.end());
  EXPECT_EQ(read_tokens(folder.write("t.npy", npy_of("<u2", u2))), expected);
  EXPECT_EQ(read_tokens(folder.write("t.npy", npy_of("<i4", expected))), expected);
  EXPECT_EQ(read_tokens(folder.write("t.npy", npy_of("<i8", i8))), expected);
  for (const char major : {'\1', '\2', '\3'}) {
    EXPECT_EQ(read_tokens(folder.write("t.npy", npy(dictionary("<i4", 4), data_of(expected), major))),
              expected);
  }
  const std::vector<std::int32_t> large = {std::numeric_limits<std::int32_t>::max()};
  EXPECT_EQ(read_tokens(folder.write("t.npy", npy_of("<i4", large))), large);
}

TEST(ReadTokens, TakesOtherSpellingsOfTheDictionary) {
  const TempFolder folder;
  for (const char* text : {
           "{'descr': '<i4', 'fortran_order': True, 'shape': (1,), }\n",
           R"({"shape":(1,),"fortran_order":False,"descr":"<i4"})",
           "  {\t'descr' : '<i4' , 'fortran_order' : False , 'shape' : ( 1 , ) }  \n",
           "{'descr': '<i4', 'fortran_order': False, 'shape': (1)}",
       }) {
    EXPECT_EQ(read_tokens(folder.write("t.npy", npy(text, std::string("\x05\0\0\0", 4)))),
              std::vector<std::int32_t>{5})
        << text;
  }
}

TEST(ReadTokens, RefusesOtherFiles) {
  struct Case {
    std::string bytes;
    std::vector<std::string> parts;
  };
  const std::string four(4, '\0');
  const auto with = [&four](const std::string& text) { return npy(text, four); };
  std::string long_header(npy(std::string(70'000, ' '), four, 2));
  const std::vector<Case> cases = {
      {"", {"not a NumPy file", "found 0 bytes"}},
      {"\x93NUMP", {"not a NumPy file"}},
      {"PK\x03\x04 zipped archive", {"not a NumPy file", "found other bytes"}},
      {npy(dictionary("<i4", 1), four, 0), {"version", "found 0.0"}},
      {npy(dictionary("<i4", 1), four, 4), {"version", "1.0, 2.0 or 3.0", "found 4.0"}},
      {std::string("\x93NUMPY\x01\x01\x00\x00", 10), {"version", "found 1.1"}},
      {std::string("\x93NUMPY\x02\x00\xff\xff\xff\xff", 12), {"header is too long", "found 4294967295"}},
      {long_header, {"header is too long", "found 70000"}},
      {std::string("\x93NUMPY\x01\x00\xff\xff{}", 12), {"truncated", "expected at least 65545", "found 12"}},
      // dtypes
      {npy(dictionary(">i4", 1), four), {"dtype", "<u2, <i4 or <i8", "found >i4"}},
      {npy(dictionary("<u4", 1), four), {"dtype", "found <u4"}},
      {npy(dictionary("<f4", 1), four), {"dtype", "found <f4"}},
      {npy(dictionary("|u1", 4), four), {"dtype", "found |u1"}},
      {npy(dictionary("|O", 1), four), {"dtype", "found |O"}},
      {with("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,), }"),
       {"damaged", "a quoted string"}},
      // shapes
      {with("{'descr': '<i4', 'fortran_order': False, 'shape': (), }"), {"one dimension", "found 0"}},
      {with("{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1), }"), {"one dimension", "found 2"}},
      {with("{'descr': '<i4', 'fortran_order': True, 'shape': (1, 1), }"), {"found 2 in Fortran order"}},
      {npy(dictionary("<i4", 0), ""), {"holds no tokens"}},
      {with("{'descr': '<i4', 'fortran_order': False, 'shape': (-1,), }"), {"damaged", "non-negative"}},
      {with("{'descr': '<i4', 'fortran_order': False, 'shape': (18446744073709551616,), }"), {"below 2^64"}},
      {npy(dictionary("<i4", 2), four), {"truncated", "expected 2 elements of 4 bytes", "found 4 bytes"}},
      {npy(dictionary("<i8", ~0ULL), four), {"truncated", "found 4 bytes"}},
      {npy(dictionary("<i4", 1ULL << 62U), four), {"truncated"}},
      {npy(dictionary("<i4", 1), four + "x"), {"bytes after the last token", "found 5 bytes"}},
      {npy(dictionary("<i4", 1), four + four), {"bytes after the last token", "found 8 bytes"}},
      // dictionaries
      {with(""), {"damaged", "'{'"}},
      {with("{}"), {"damaged", "descr, fortran_order and shape"}},
      {with("{'descr': '<i4', 'shape': (1,)}"), {"damaged", "descr, fortran_order and shape"}},
      {with("{'descr': '<i4', 'descr': '<i4', 'fortran_order': False, 'shape': (1,)}"), {"once each"}},
      {with("{'descr': '<i4', 'fortran_order': False, 'shape': (1,), 'x': 1}"), {"once each"}},
      {with("{'descr': '<i4', 'fortran_order': 0, 'shape': (1,)}"), {"True or False"}},
      {with("{'descr': '<i4', 'fortran_order': False, 'shape': [1]}"), {"'('"}},
      {with("{'descr': '<i4', 'fortran_order': False, 'shape': (1,)"), {"'}'"}},
      {with("{'descr': '<i4', 'fortran_order': False, 'shape': (1,)} x"), {"nothing after"}},
      {with("{'descr': '<i4"), {"a closing quote"}},
      {with("{'descr' '<i4'}"), {"':'"}},
      // ids
      {npy_of<std::int32_t>("<i4", {3, -1}), {"index 1", "from 0 to 2147483647", "found -1"}},
      {npy_of<std::int64_t>("<i8", {3, 4, -7}), {"index 2", "found -7"}},
      {npy_of<std::int64_t>("<i8", {1LL << 31}), {"index 0", "found 2147483648"}},
  };
  const TempFolder folder;
  for (const Case& test : cases) {
    SCOPED_TRACE(test.bytes.substr(0, 100));
    std::vector<std::string> parts = test.parts;
    parts.emplace_back("t.npy: ");
    expect_error(ErrorKind::input, parts, [&] { read_tokens(folder.write("t.npy", test.bytes)); });
  }
  expect_error(ErrorKind::input, {"missing.npy", "cannot open"},
               [&] { read_tokens(folder / "missing.npy"); });
}

TEST(ReadTokens, RefusesEveryCutAndSurvivesEveryFlippedByte) {
  const TempFolder folder;
  std::mt19937 random(3);
  for (const char major : {'\1', '\2'}) {
    const std::string bytes = npy(dictionary("<i4", 3), std::string(12, '\1'), major);
    for (std::size_t size = 0; size < bytes.size(); ++size) {
      expect_error(ErrorKind::input, {"t.npy: "},
                   [&] { read_tokens(folder.write("t.npy", bytes.substr(0, size))); });
    }
    for (std::size_t at = 0; at < bytes.size(); ++at) {
      for (int repetition = 0; repetition < 6; ++repetition) {
        std::string damaged = bytes;
        damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ (1 + random() % 255));
        try {
          EXPECT_EQ(read_tokens(folder.write("t.npy", damaged)).size() % 3, 0U);
        } catch (const Error& error) {
          EXPECT_EQ(error.kind(), ErrorKind::input);
        }
      }
    }
  }
}

TEST(WriteFloatArray, WritesWhatNumpyReads) {
  const TempFolder folder;
  PendingFile file(folder / "a.npy");
  write_float_array(file, {2, 3}, [](std::int64_t i) {
    const auto first = static_cast<float>(10 * i);
    return std::vector<float>{first, first + 1, first + 2};
  });
  const std::string bytes = read_bytes(folder / "a.npy");
  ASSERT_EQ(bytes.size(), 128U + 24U);
  EXPECT_TRUE(bytes.starts_with("\x93NUMPY"));
  EXPECT_NE(bytes.find("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, ), }"), std::string::npos);
  EXPECT_EQ(bytes.substr(128), data_of(std::vector<float>{0, 1, 2, 10, 11, 12}));
}

TEST(ReadSequences, CutsFromTheStart) {
  const TempFolder folder;
  std::vector<std::int32_t> tokens(11);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<std::int32_t>(10 * i);
  }
  const std::filesystem::path path = folder.write("t.npy", npy_of("<i4", tokens));
  const Sequences all = read_sequences(path, 3, 0, 81);
  EXPECT_EQ(all.count, 3);
  EXPECT_EQ(all.length, 3);
  EXPECT_EQ(all.tokens, (std::vector<std::int32_t>{0, 10, 20, 30, 40, 50, 60, 70, 80}));
  const Sequences two = read_sequences(path, 4, 2, 1'000'000'000'000);
  EXPECT_EQ(two.count, 2);
  EXPECT_EQ(two.tokens, (std::vector<std::int32_t>{0, 10, 20, 30, 40, 50, 60, 70}));
  EXPECT_EQ(read_sequences(path, 11, 1, 101).tokens, tokens);
}

TEST(ReadSequences, Refuses) {
  const TempFolder folder;
  const std::filesystem::path path =
      folder.write("t.npy", npy_of<std::int32_t>("<i4", {5, 6, 7, 8, 9, 10, 11}));
  expect_error(ErrorKind::usage, {"at least 2", "not 1"}, [&] { read_sequences(path, 1, 1, 100); });
  expect_error(ErrorKind::usage, {"at least 2", "not -5"}, [&] { read_sequences(path, -5, 1, 100); });
  expect_error(ErrorKind::usage, {"negative", "-1"}, [&] { read_sequences(path, 2, -1, 100); });
  expect_error(ErrorKind::usage, {"vocabulary"}, [&] { read_sequences(path, 2, 1, 0); });
  expect_error(ErrorKind::usage, {"t.npy", "7 tokens", "3 sequences of 2", "not 4"},
               [&] { read_sequences(path, 2, 4, 100); });
  expect_error(ErrorKind::usage, {"7 tokens", "0 sequences of 8"}, [&] { read_sequences(path, 8, 0, 100); });
  expect_error(ErrorKind::usage, {"0 sequences"},
               [&] { read_sequences(path, std::numeric_limits<std::int64_t>::max(), 1, 100); });
  expect_error(ErrorKind::usage, {"3 sequences"},
               [&] { read_sequences(path, 2, std::numeric_limits<std::int64_t>::max(), 100); });
  expect_error(ErrorKind::input, {"t.npy", "index 4", "from 0 to 8", "found 9"},
               [&] { read_sequences(path, 3, 2, 9); });
  // Only ids that are taken count.
  EXPECT_EQ(read_sequences(path, 2, 2, 9).tokens, (std::vector<std::int32_t>{5, 6, 7, 8}));
}

}  // namespace
}  // namespace relatent
