#include "formats/checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "formats/hash.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::bytes_of;
using testing_support::expect_error;
using testing_support::read_bytes;
using testing_support::TempFolder;

struct Source {
  std::vector<TensorSpec> specs;
  std::vector<std::vector<float>> values;
};

Source random_source(unsigned seed) {
  Source source;
  source.specs = {{"embed", DType::bf16, {7, 5}},
                  {"norm", DType::f32, {5}},
                  {"proj", DType::f16, {3, 5}},
                  {"wide", DType::f64, {2, 4}}};
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> small(-127, 127);
  for (const TensorSpec& spec : source.specs) {
    std::vector<float> values(spec.bytes() / size_of(spec.dtype));
    // Few bits, so that every dtype holds the values exactly.
    std::generate(values.begin(), values.end(), [&] { return static_cast<float>(small(random)) / 64.0F; });
    source.values.push_back(values);
  }
  return source;
}

std::uint64_t write_checkpoint(const fs::path& folder, const Source& source, std::uint64_t max_shard_bytes) {
  fs::create_directories(folder);
  write_text(folder / "config.json", R"({"model_type": "llama", "hidden_size": 5, "b": {"z": 1, "a": 2}})");
  CheckpointWriter writer(folder, source.specs, max_shard_bytes);
  for (std::size_t i = source.specs.size(); i-- > 0;) {
    writer.write_floats(source.specs[i].name, source.values[i]);
  }
  writer.finish();
  return writer.bytes_written();
}

TEST(Checkpoint, ReadsWhatWasWrittenHoweverItIsCut) {
  const TempFolder folder;
  const Source source = random_source(1);
  struct Case {
    std::uint64_t max_shard_bytes;
    std::size_t shards;
  };
  std::optional<std::string> fingerprint;
  for (const Case& test : {Case{1'000'000, 1}, Case{std::numeric_limits<std::uint64_t>::max(), 1},
                           Case{90, 3}, Case{120, 2}, Case{184, 1}, Case{183, 2}, Case{1, 4}, Case{0, 4}}) {
    const fs::path path = folder / std::to_string(test.max_shard_bytes);
    const std::uint64_t written = write_checkpoint(path, source, test.max_shard_bytes);

    std::uint64_t on_disk = 0;
    std::size_t shards = 0;
    for (const auto& entry : fs::directory_iterator(path)) {
      if (entry.path().extension() == ".safetensors") {
        ++shards;
        on_disk += entry.file_size();
      }
    }
    EXPECT_EQ(shards, test.shards) << test.max_shard_bytes;
    EXPECT_EQ(on_disk, written);
    EXPECT_EQ(fs::exists(path / "model.safetensors.index.json"), test.shards > 1);

    Checkpoint opened = Checkpoint::open(path);
    Checkpoint checkpoint = std::move(opened);
    EXPECT_EQ(checkpoint.folder(), path);
    EXPECT_EQ(checkpoint.config_path(), path / "config.json");
    EXPECT_EQ(checkpoint.files().size(), test.shards);
    EXPECT_EQ(checkpoint.index_path().has_value(), test.shards > 1);
    EXPECT_EQ(checkpoint.index_path().value_or(path / kIndexName), path / "model.safetensors.index.json");
    EXPECT_EQ(checkpoint.config().dump(), R"({"model_type":"llama","hidden_size":5,"b":{"z":1,"a":2}})");
    EXPECT_EQ(checkpoint.tensor_names(), (std::vector<std::string>{"embed", "norm", "proj", "wide"}));
    EXPECT_EQ(checkpoint.tensor_bytes(), 184U);
    for (std::size_t i = 0; i < source.specs.size(); ++i) {
      const TensorSpec& spec = source.specs[i];
      EXPECT_TRUE(checkpoint.contains(spec.name));
      EXPECT_EQ(checkpoint.info(spec.name).shape, spec.shape);
      EXPECT_EQ(checkpoint.info(spec.name).dtype, spec.dtype);
      EXPECT_EQ(checkpoint.bytes(spec.name).size(), spec.bytes());
      EXPECT_EQ(checkpoint.file_of(spec.name).find(spec.name), &checkpoint.info(spec.name));
      const MatrixF matrix = checkpoint.read_matrix(spec.name);
      EXPECT_EQ(matrix.rows(), spec.shape.size() == 1 ? 1 : spec.shape[0]);
      EXPECT_EQ(matrix.cols(), spec.shape.back());
      EXPECT_TRUE(std::equal(source.values[i].begin(), source.values[i].end(), matrix.data()));
      checkpoint.release(spec.name);
    }
    EXPECT_FALSE(checkpoint.contains("missing"));
    expect_error(ErrorKind::input, {path.string(), "tensor missing", "no such tensor"},
                 [&] { static_cast<void>(checkpoint.info("missing")); });
    expect_error(ErrorKind::input, {"tensor missing"}, [&] { checkpoint.read_matrix("missing"); });

    const std::string found = checkpoint.fingerprint();
    EXPECT_EQ(found.size(), 32U);
    EXPECT_EQ(found.find_first_not_of("0123456789abcdef"), std::string::npos);
    EXPECT_EQ(found, fingerprint.value_or(found));
    fingerprint = found;
  }
}

TEST(Checkpoint, TensorsAreCutIntoRows) {
  const TempFolder folder;
  const Source source = random_source(9);
  write_checkpoint(folder.path(), source, 100);
  Checkpoint checkpoint = Checkpoint::open(folder.path());
  const MatrixF whole = checkpoint.read_matrix("embed");
  const std::uint64_t bytes = checkpoint.tensor_bytes();
  checkpoint.cut_rows("embed", {{"one", 4}, {"two", 1}, {"three", 2}});
  EXPECT_FALSE(checkpoint.contains("embed"));
  EXPECT_EQ(checkpoint.tensor_names(),
            (std::vector<std::string>{"norm", "one", "proj", "three", "two", "wide"}));
  EXPECT_EQ(checkpoint.tensor_bytes(), bytes);
  EXPECT_TRUE(checkpoint.read_matrix("one") == whole.topRows(4));
  EXPECT_TRUE(checkpoint.read_matrix("two") == whole.row(4));
  EXPECT_TRUE(checkpoint.read_matrix("three") == whole.bottomRows(2));
  // Copied without being decoded.
  std::filesystem::create_directories(folder / "copy");
  CheckpointWriter writer(folder / "copy", {{"x", DType::bf16, {2, 5}}}, 100);
  writer.copy("x", checkpoint, "three");
  EXPECT_EQ(writer.stored_checksum("x"), checksum_of(checkpoint.bytes("three")));
  writer.finish();

  const auto cut = [&](const std::string& name, const std::string& piece, std::int64_t rows) {
    Checkpoint again = Checkpoint::open(folder.path());
    again.cut_rows(name, {{piece, rows}, {"rest", 3}});
  };
  EXPECT_NO_THROW(cut("embed", "one", 4));
  expect_error(ErrorKind::input, {"embed", "shape", "8 rows", "[7, 5]"}, [&] { cut("embed", "one", 5); });
  expect_error(ErrorKind::input, {"nothing", "no such tensor"}, [&] { cut("nothing", "one", 4); });
  expect_error(ErrorKind::input, {"norm", "is there beside embed"}, [&] { cut("embed", "norm", 4); });
}

TEST(Checkpoint, FingerprintSeesEveryDifference) {
  const TempFolder folder;
  Source source = random_source(2);
  const auto fingerprint = [&](const Source& contents) {
    write_checkpoint(folder / "a", contents, 1'000'000);
    return Checkpoint::open(folder / "a").fingerprint();
  };
  const std::string original = fingerprint(source);
  EXPECT_EQ(fingerprint(source), original);

  // The order of members in config.json means nothing; a value does.
  write_text(folder / "a/config.json", R"({"b": {"a": 2, "z": 1}, "hidden_size": 5, "model_type": "llama"})");
  EXPECT_EQ(Checkpoint::open(folder / "a").fingerprint(), original);
  write_text(folder / "a/config.json", R"({"b": {"a": 2, "z": 1}, "hidden_size": 6, "model_type": "llama"})");
  EXPECT_NE(Checkpoint::open(folder / "a").fingerprint(), original);

  std::vector<std::string> seen = {original};
  Source changed = source;
  changed.values[3].back() += 1.0F;
  seen.push_back(fingerprint(changed));
  changed = source;
  changed.specs[0].shape = {5, 7};
  seen.push_back(fingerprint(changed));
  changed = source;
  changed.specs[2].name = "proj2";
  seen.push_back(fingerprint(changed));
  changed = source;
  changed.specs[2].dtype = DType::bf16;
  seen.push_back(fingerprint(changed));
  std::sort(seen.begin(), seen.end());
  EXPECT_EQ(std::adjacent_find(seen.begin(), seen.end()), seen.end());
}

TEST(Checkpoint, ReadMatrixRefusesOtherTensors) {
  const TempFolder folder;
  folder.write("config.json", "{}");
  SafetensorsWriter writer(folder / "model.safetensors", {{"ids", DType::i32, {1}},
                                                          {"cube", DType::f32, {2, 1, 3}},
                                                          {"four", DType::f32, {1, 1, 1, 1}},
                                                          {"scalar", DType::f16, {}},
                                                          {"empty", DType::f32, {0, 3}}});
  writer.write("ids", bytes_of("1234"));
  const std::vector<float> numbers = {1, 2, 3, 4, 5, 6};
  writer.write("cube", std::as_bytes(std::span(numbers)));
  writer.write("four", bytes_of("1234"));
  writer.write("scalar", bytes_of("12"));
  writer.write("empty", {});
  writer.finish();
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  expect_error(ErrorKind::input, {"model.safetensors", "tensor ids", "BF16, F16, F32 or F64", "found I32"},
               [&] { checkpoint.read_matrix("ids"); });
  expect_error(ErrorKind::input, {"tensor four", "one to three dimensions", "found [1, 1, 1, 1]"},
               [&] { checkpoint.read_matrix("four"); });
  expect_error(ErrorKind::input, {"tensor scalar", "found []"}, [&] { checkpoint.read_matrix("scalar"); });
  EXPECT_EQ(checkpoint.read_matrix("empty").cols(), 3);
  // Three dimensions: matrices below each other.
  MatrixF cube(2, 3);
  cube << 1, 2, 3, 4, 5, 6;
  EXPECT_TRUE(checkpoint.read_matrix("cube") == cube);
}

TEST(CheckpointWriter, GivesPermissions) {
  const TempFolder folder;
  const Source source = random_source(3);
  fs::create_directory(folder / "a");
  CheckpointWriter writer(folder / "a", source.specs, 70, fs::perms::owner_read | fs::perms::owner_write);
  for (std::size_t i = 0; i < source.specs.size(); ++i) {
    writer.write_floats(source.specs[i].name, source.values[i]);
  }
  writer.finish();
  for (const auto& entry : fs::directory_iterator(folder / "a")) {
    EXPECT_EQ(entry.status().permissions(), fs::perms::owner_read | fs::perms::owner_write) << entry;
  }
  write_text(folder / "a/config.json", "{}");
  fs::permissions(folder / "a/model-00002-of-00003.safetensors", fs::perms(0444));
  EXPECT_EQ(Checkpoint::open(folder / "a").weight_permissions(), fs::perms::owner_read);
}

TEST(CheckpointWriter, NamesShardsAndWritesTheIndex) {
  const TempFolder folder;
  const Source source = random_source(3);
  write_checkpoint(folder / "a", source, 70);
  EXPECT_EQ(read_bytes(folder / "a/model.safetensors.index.json"), R"({
  "metadata": {
    "total_size": 184
  },
  "weight_map": {
    "embed": "model-00001-of-00003.safetensors",
    "norm": "model-00002-of-00003.safetensors",
    "proj": "model-00002-of-00003.safetensors",
    "wide": "model-00003-of-00003.safetensors"
  }
}
)");
}

TEST(CheckpointWriter, GoesOnWhereAnotherStopped) {
  const TempFolder folder;
  const Source source = random_source(6);
  write_checkpoint(folder / "a", source, 70);
  for (const bool finishing : {false, true}) {
    fs::remove_all(folder / "b");
    fs::create_directory(folder / "b");
    {
      CheckpointWriter writer(folder / "b", source.specs, 70);
      writer.write_floats(source.specs[0].name, source.values[0]);
      writer.write_floats(source.specs[2].name, source.values[2]);
      writer.flush();
    }
    if (finishing) {
      // Stopped between the first shard and the next.
      const fs::path shard = folder / "b/model-00001-of-00003.safetensors";
      fs::rename(shard.string() + ".partial", shard);
    }
    folder.write("b/pytorch_model.bin", "");
    const auto writer = CheckpointWriter::reopen(folder / "b", source.specs, 70);
    ASSERT_NE(writer, nullptr);
    EXPECT_FALSE(fs::exists(folder / "b/pytorch_model.bin"));
    for (std::size_t i = 0; i < source.specs.size(); ++i) {
      if (i == 0 || i == 2) {
        writer->mark_written(source.specs[i].name);
      } else {
        writer->write_floats(source.specs[i].name, source.values[i]);
      }
    }
    EXPECT_THROW(writer->mark_written(source.specs[0].name), std::invalid_argument);
    writer->finish();
    for (const auto& entry : fs::directory_iterator(folder / "b")) {
      EXPECT_EQ(read_bytes(entry.path()), read_bytes(folder / "a" / entry.path().filename().string()));
    }
    EXPECT_TRUE(fs::exists(folder / "b/model.safetensors.index.json"));
  }
}

TEST(CheckpointWriter, DoesNotGoOnWithOtherShards) {
  const TempFolder folder;
  const Source source = random_source(6);
  fs::create_directory(folder / "b");
  EXPECT_EQ(CheckpointWriter::reopen(folder / "b", source.specs, 70), nullptr);
  CheckpointWriter(folder / "b", source.specs, 70).flush();
  EXPECT_EQ(CheckpointWriter::reopen(folder / "b", source.specs, 120), nullptr);
  const fs::path shard = folder / "b/model-00002-of-00003.safetensors.partial";
  fs::resize_file(shard, fs::file_size(shard) - 1);
  EXPECT_EQ(CheckpointWriter::reopen(folder / "b", source.specs, 70), nullptr);
}

TEST(CheckpointWriter, CopiesTensorsUndecoded) {
  const TempFolder folder;
  const Source source = random_source(4);
  write_checkpoint(folder / "a", source, 90);
  const Checkpoint from = Checkpoint::open(folder / "a");
  fs::create_directory(folder / "b");
  fs::copy_file(from.config_path(), folder / "b/config.json");
  CheckpointWriter writer(folder / "b", source.specs, 120);
  for (const TensorSpec& spec : source.specs) {
    writer.copy(spec.name, from, spec.name);
  }
  writer.finish();
  EXPECT_EQ(Checkpoint::open(folder / "b").fingerprint(), from.fingerprint());
}

TEST(CheckpointWriter, RefusesMisuseAndBadValues) {
  const TempFolder folder;
  const std::vector<TensorSpec> specs = {
      {"h", DType::f16, {3}}, {"w", DType::f32, {3}}, {"i", DType::i8, {3}}};
  CheckpointWriter writer(folder.path(), specs, 6);
  const float infinity = std::numeric_limits<float>::infinity();
  expect_error(ErrorKind::input,
               {"model-00001-of-00003.safetensors", "tensor h", "too large for F16", "2 of 3"}, [&] {
                 writer.write_floats("h", std::vector<float>{1e6F, 1.0F, -65520.0F});
               });
  expect_error(ErrorKind::input, {"model-00002-of-00003.safetensors", "tensor w", "finite", "nan at index 1"},
               [&] {
                 writer.write_floats("w", std::vector<float>{1.0F, std::nanf(""), 2.0F});
               });
  expect_error(ErrorKind::input, {"tensor h", "finite", "-inf at index 2"}, [&] {
    writer.write_floats("h", std::vector<float>{1.0F, 2.0F, -infinity});
  });
  EXPECT_THROW(writer.write_floats("h", std::vector<float>{1.0F}), std::invalid_argument);
  EXPECT_THROW(writer.write_floats("w", std::vector<float>{1.0F}), std::invalid_argument);
  EXPECT_THROW(writer.write_floats("i", std::vector<float>{1.0F, 2.0F, 3.0F}), std::invalid_argument);
  EXPECT_THROW(writer.write_floats("x", std::vector<float>{1.0F}), std::invalid_argument);
  EXPECT_THROW(writer.write("x", bytes_of("abc")), std::invalid_argument);
  EXPECT_THROW(writer.finish(), std::logic_error);
  EXPECT_THROW(CheckpointWriter(folder / "c", {{"a", DType::u8, {1}}, {"a", DType::u8, {1}}}, 1),
               std::invalid_argument);
}

TEST(CheckpointWriter, UnfinishedShardsLeaveNothing) {
  const TempFolder folder;
  {
    CheckpointWriter writer(folder.path(), {{"a", DType::u8, {3}}, {"b", DType::u8, {3}}}, 3);
    writer.write("a", bytes_of("abc"));
  }
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

}  // namespace
}  // namespace relatent
