#include "formats/gguf_writer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/safetensors.h"
#include "tests/support/expect_error.h"
#include "tests/support/gguf_bytes.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::bytes_of;
using testing_support::expect_error;
using testing_support::read_bytes;
using testing_support::TempFolder;
using testing_support::text_of;
using testing_support::gguf_bytes::good;
using testing_support::gguf_bytes::letters;
using testing_support::gguf_bytes::raw;

TEST(GgufWriter, GoldenBytes) {
  const TempFolder folder;
  GgufMetadata metadata;
  {
    const GgufFile source = GgufFile::open(folder.write("source.gguf", good().bytes()));
    metadata = source.metadata();
  }
  GgufWriter writer(folder / "a.gguf", metadata,
                    {{"token_embd.weight", DType::f32, {2, 3}},
                     {"norm", DType::f16, {5}},
                     {"four", DType::bf16, {4, 3, 2, 1}}});
  writer.write("four", bytes_of(letters(48)));
  writer.write("token_embd.weight", bytes_of(letters(24)));
  EXPECT_FALSE(std::filesystem::exists(folder / "a.gguf"));
  writer.write("norm", bytes_of(letters(10)));
  writer.finish();
  EXPECT_FALSE(std::filesystem::exists(folder / "a.gguf.partial"));
  const std::string expected = good().bytes() + std::string(16, '\0');
  EXPECT_EQ(read_bytes(folder / "a.gguf"), expected);
  EXPECT_EQ(writer.file_bytes(), expected.size());
}

TEST(GgufWriter, WritesOneValueOfEveryTypeAndReadsItBack) {
  const TempFolder folder;
  const GgufMetadata metadata = {
      {"u8s", std::vector<std::uint8_t>{1, 255}},
      {"i8s", std::vector<std::int8_t>{-1}},
      {"u16s", std::vector<std::uint16_t>{65535}},
      {"i16s", std::vector<std::int16_t>{-2}},
      {"u32s", std::vector<std::uint32_t>{4'294'967'295U}},
      {"i32s", std::vector<std::int32_t>{-3, 4}},
      {"f32s", std::vector<float>{0.5F}},
      {"bools", std::vector<bool>{false, true, true}},
      {"strings", std::vector<std::string>{"a b", std::string("\0", 1)}},
      {"u64s", std::vector<std::uint64_t>{~std::uint64_t{0}}},
      {"i64s", std::vector<std::int64_t>{-5}},
      {"f64s", std::vector<double>{1e-300}},
      {"none", std::vector<std::int32_t>{}},
      {"general.alignment", std::uint32_t{64}},
  };
  GgufWriter writer(folder / "a.gguf", metadata, {{"a", DType::f32, {1}}, {"b", DType::f32, {1}}});
  writer.write_floats("b", std::vector<float>{2});
  writer.write_floats("a", std::vector<float>{1});
  writer.finish();
  const GgufFile file = GgufFile::open(folder / "a.gguf");
  EXPECT_EQ(file.metadata(), metadata);
  EXPECT_EQ(file.alignment(), 64U);
  EXPECT_EQ(file.tensors()[0].offset % 64, 0U);
  EXPECT_EQ(file.tensors()[1].offset, file.tensors()[0].offset + 64);
  EXPECT_EQ(file.file_bytes(), file.tensors()[1].offset + 64);
  EXPECT_EQ(text_of(file.bytes(file.tensors()[1])), raw(2.0F));
}

TEST(GgufWriter, RoundsFloatsToTheDType) {
  const TempFolder folder;
  const std::vector<float> values = {1.0F, -1.0F / 3.0F, 65504.0F, 1e-7F};
  GgufWriter writer(folder / "a.gguf", {},
                    {{"f32", DType::f32, {4}}, {"f16", DType::f16, {2, 2}}, {"bf16", DType::bf16, {4, 1}}});
  for (const char* name : {"bf16", "f32", "f16"}) {
    writer.write_floats(name, values);
  }
  writer.finish();
  const GgufFile file = GgufFile::open(folder / "a.gguf");
  for (const GgufTensor& one : file.tensors()) {
    std::vector<float> found(4);
    decode_floats(one.dtype, file.bytes(one), found);
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(found[i], rounded(one.dtype, values[i])) << one.name << " " << i;
    }
  }
}

TEST(GgufWriter, RefusesNumbersThatNoFileShouldHold) {
  const TempFolder folder;
  GgufWriter writer(folder / "a.gguf", {}, {{"f32", DType::f32, {2}}, {"f16", DType::f16, {2}}});
  expect_error(ErrorKind::input, {"a.gguf", "tensor f32", "not a number", "inf at index 1"}, [&] {
    writer.write_floats("f32", std::vector<float>{1, std::numeric_limits<float>::infinity()});
  });
  expect_error(ErrorKind::input, {"tensor f16", "not a number", "nan at index 0"}, [&] {
    writer.write_floats("f16", std::vector<float>{std::nanf(""), 1});
  });
  expect_error(ErrorKind::input, {"tensor f16", "too large for F16", "found 1 of 2", "wider dtype"}, [&] {
    writer.write_floats("f16", std::vector<float>{1, 70000});
  });
  writer.write_floats("f32", std::vector<float>{1, 70000});
  writer.write_floats("f16", std::vector<float>{1, 2});
  writer.finish();
}

TEST(GgufWriter, CopiesATensorOfASafetensorsFile) {
  const TempFolder folder;
  SafetensorsWriter first(folder / "a.safetensors", {{"w", DType::bf16, {2, 3}}});
  first.write("w", bytes_of("abcdefghijkl"));
  first.finish();
  const SafetensorsFile source = SafetensorsFile::open(folder / "a.safetensors");
  GgufWriter writer(folder / "a.gguf", {}, {{"x", DType::bf16, {2, 3}}, {"y", DType::bf16, {3, 2}}});
  EXPECT_THROW(writer.copy("y", source, source.tensors()[0]), std::invalid_argument);
  writer.copy("x", source, source.tensors()[0]);
  EXPECT_THROW(writer.copy("x", source, source.tensors()[0]), std::invalid_argument);
  writer.write("y", bytes_of("ABCDEFGHIJKL"));
  writer.finish();
  const GgufFile file = GgufFile::open(folder / "a.gguf");
  EXPECT_EQ(text_of(file.bytes(*file.find_tensor("x"))), "abcdefghijkl");
}

TEST(GgufWriter, WritesAnEmptyFile) {
  const TempFolder folder;
  GgufWriter writer(folder / "a.gguf", {{"general.architecture", std::string("x")}}, {});
  writer.finish();
  EXPECT_TRUE(GgufFile::open(folder / "a.gguf").tensors().empty());
  EXPECT_EQ(writer.file_bytes() % 32, 0U);
}

TEST(GgufWriter, GoesOnWithAFileThatWasKept) {
  const TempFolder folder;
  const GgufMetadata metadata = {{"k", std::uint32_t{1}}};
  const std::vector<TensorSpec> specs = {{"a", DType::f32, {1}}, {"b", DType::f32, {1}}};
  const std::filesystem::path path = folder / "a.gguf";
  EXPECT_EQ(GgufWriter::reopen(path, metadata, specs), nullptr);
  {
    GgufWriter writer(path, metadata, specs);
    writer.write("a", bytes_of("abcd"));
    writer.flush();
    writer.write("b", bytes_of("lost"));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_EQ(GgufWriter::reopen(path, {{"k", std::uint32_t{2}}}, specs), nullptr);
  EXPECT_EQ(GgufWriter::reopen(path, metadata, {{"a", DType::f32, {1}}}), nullptr);
  EXPECT_EQ(GgufWriter::reopen(path, metadata, {{"b", DType::f32, {1}}, {"a", DType::f32, {1}}}), nullptr);
  EXPECT_TRUE(std::filesystem::exists(folder / "a.gguf.partial"));
  std::unique_ptr<GgufWriter> writer = GgufWriter::reopen(path, metadata, specs);
  ASSERT_NE(writer, nullptr);
  EXPECT_THROW(writer->finish(), std::logic_error);
  EXPECT_THROW(writer->mark_written("c"), std::invalid_argument);
  writer->mark_written("a");
  EXPECT_THROW(writer->mark_written("a"), std::invalid_argument);
  writer->write("b", bytes_of("efgh"));
  writer->finish();
  const std::string bytes = read_bytes(path);

  // A finished file is taken up as well.
  writer = GgufWriter::reopen(path, metadata, specs);
  ASSERT_NE(writer, nullptr);
  EXPECT_FALSE(std::filesystem::exists(path));
  writer->mark_written("a");
  writer->mark_written("b");
  writer->finish();
  EXPECT_EQ(read_bytes(path), bytes);
  const GgufFile file = GgufFile::open(path);
  EXPECT_EQ(text_of(file.bytes(file.tensors()[0])), "abcd");
  EXPECT_EQ(text_of(file.bytes(file.tensors()[1])), "efgh");

  // The wrong length, or nothing at all.
  folder.write("b.gguf.partial", bytes.substr(0, bytes.size() - 1));
  EXPECT_EQ(GgufWriter::reopen(folder / "b.gguf", metadata, specs), nullptr);
  folder.write("c.gguf.partial", "");
  EXPECT_EQ(GgufWriter::reopen(folder / "c.gguf", metadata, specs), nullptr);
}

TEST(GgufWriter, RefusesMisuse) {
  const TempFolder folder;
  const auto make = [&](const GgufMetadata& metadata, const std::vector<TensorSpec>& specs) {
    const GgufWriter writer(folder / "a.gguf", metadata, specs);
  };
  const std::vector<GgufMetadata> bad_metadata = {
      {{"", std::uint32_t{1}}},
      {{"a", std::uint32_t{1}}, {"a", 1.0F}},
      {{"general.alignment", std::uint32_t{0}}},
      {{"general.alignment", std::uint32_t{24}}},
      {{"general.alignment", std::uint64_t{32}}},
  };
  for (const GgufMetadata& metadata : bad_metadata) {
    EXPECT_THROW(make(metadata, {}), std::invalid_argument);
  }
  const std::vector<std::vector<TensorSpec>> bad_specs = {
      {{"a", DType::f32, {1}}, {"a", DType::f32, {2}}},
      {{"", DType::f32, {1}}},
      {{std::string("a\0", 2), DType::f32, {1}}},
      {{std::string(64, 'n'), DType::f32, {1}}},
      {{"a", DType::f32, {}}},
      {{"a", DType::f32, {1, 1, 1, 1, 1}}},
      {{"a", DType::f32, {0}}},
      {{"a", DType::f32, {-1}}},
      {{"a", DType::f32, {1LL << 61}}},
      {{"a", DType::f64, {1}}},
      {{"a", DType::u8, {1}}},
      {{"a", DType::f32, {1LL << 60}},
       {"b", DType::f32, {1LL << 60}},
       {"c", DType::f32, {1LL << 60}},
       {"d", DType::f32, {1LL << 60}}},
  };
  for (const std::vector<TensorSpec>& specs : bad_specs) {
    EXPECT_THROW(make({}, specs), std::invalid_argument);
  }
  expect_error(ErrorKind::machine, {"a.gguf.partial", "cannot reserve"}, [&] {
    make({}, {{"a", DType::f32, {1LL << 60}}});
  });
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  expect_error(ErrorKind::machine, {"no/a.gguf.partial"},
               [&] { const GgufWriter writer(folder / "no/a.gguf", {}, {}); });

  GgufWriter writer(folder / "a.gguf", {}, {{"a", DType::f32, {1}}, {"b", DType::f16, {2}}});
  EXPECT_THROW(writer.write("a", bytes_of("x")), std::invalid_argument);
  EXPECT_THROW(writer.write("c", bytes_of("x")), std::invalid_argument);
  EXPECT_THROW(writer.write_floats("c", std::vector<float>{1}), std::invalid_argument);
  EXPECT_THROW(writer.write_floats("b", std::vector<float>{1}), std::invalid_argument);
  writer.write("a", bytes_of("abcd"));
  EXPECT_THROW(writer.write("a", bytes_of("abcd")), std::invalid_argument);
  EXPECT_THROW(writer.write_floats("a", std::vector<float>{1}), std::invalid_argument);
  try {
    writer.finish();
    ADD_FAILURE() << "an unfinished file was finished";
  } catch (const std::logic_error& error) {
    EXPECT_NE(std::string(error.what()).find("tensor b "), std::string::npos) << error.what();
  }
  writer.write_floats("b", std::vector<float>{1, 2});
  writer.finish();
  EXPECT_EQ(GgufFile::open(folder / "a.gguf").tensors().size(), 2U);
}

}  // namespace
}  // namespace relatent
