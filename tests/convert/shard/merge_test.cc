#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "convert/shard/manifest.h"
#include "convert/shard/shard.h"
#include "tests/support/expect_error.h"
#include "tests/support/shards.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::edit_manifest;
using testing_support::edit_tensors;
using testing_support::expect_error;
using testing_support::read_bytes;
using testing_support::StoredTensor;
using testing_support::TempFolder;
using testing_support::tiny_model;
using Json = nlohmann::ordered_json;
using Tensors = std::map<std::string, StoredTensor>;
using Metadata = std::map<std::string, std::string>;

void ignore(Index /*done*/, Index /*all*/) {}

constexpr const char* norm = "model.norm.weight";
constexpr const char* keys = "model.layers.1.self_attn.k_proj.weight";
constexpr const char* output = "model.layers.1.self_attn.o_proj.weight";

// Shards of one model for four ranks, made anew for every damage.
class Merge : public testing::Test {
 protected:
  Merge() {
    tiny_model({.heads = 8}).write(folder_ / "source");
    write_text(folder_ / "source" / "tokenizer.json", "{}");
    write_shards({folder_ / "source", folder_ / "intact", 4, "plain"}, ignore);
    restore();
  }
  void restore() const {
    fs::remove_all(shards());
    fs::copy(folder_ / "intact", shards());
  }
  fs::path shards() const { return folder_ / "shards"; }
  fs::path rank(Index k) const { return shards() / rank_file_name(k); }
  fs::path manifest() const { return shards() / kShardsName; }
  void edit(Index k, const std::function<void(Tensors&, Metadata&)>& change) const {
    edit_tensors(rank(k), change);
  }

  void expect_refused(const std::vector<std::string>& parts) const {
    expect_error(ErrorKind::input, parts, [&] { merge_shards(shards(), folder_ / "merged", ignore); });
    EXPECT_FALSE(fs::exists(folder_ / "merged"));
    EXPECT_FALSE(fs::exists(folder_ / "merged.partial"));
    restore();
  }

  TempFolder folder_;
};

TEST_F(Merge, FilesThatAreNotThose) {
  fs::remove(rank(2));
  expect_refused({shards().string(), "missing", "model-rank-2.safetensors"});
  fs::remove(manifest());
  expect_refused({kShardsName, "cannot open"});
  fs::remove(shards() / "tokenizer.json");
  expect_refused({"tokenizer.json", "cannot open"});
  write_text(shards() / "tokenizer.json", "[]");
  expect_refused({"tokenizer.json", "changed after", "expected checksum"});
  fs::remove(shards() / "config.json");
  expect_refused({"config.json", "cannot open"});

  write_text(rank(1), "nothing of the kind");
  expect_refused({"model-rank-1.safetensors", "not a safetensors file"});
  for (const std::uint64_t size :
       {std::uint64_t{0}, std::uint64_t{5}, std::uint64_t{100}, fs::file_size(rank(1)) - 1}) {
    fs::resize_file(rank(1), size);
    expect_refused({"model-rank-1.safetensors"});
  }
  fs::remove(rank(1));
  fs::create_directory(rank(1));
  expect_refused({"model-rank-1.safetensors", "regular file"});

  fs::copy_file(rank(1), rank(3), fs::copy_options::overwrite_existing);
  expect_refused({"model-rank-3.safetensors", "not the file of this rank", "relatent_rank 3", "found 1"});
  const fs::path other = folder_ / "other";
  tiny_model({.heads = 8, .seed = 9}).write(folder_ / "another");
  write_shards({folder_ / "another", other, 4, "plain"}, ignore);
  fs::copy_file(other / rank_file_name(1), rank(1), fs::copy_options::overwrite_existing);
  expect_refused({"model-rank-1.safetensors", "does not belong", "relatent_run"});
  edit(0, [](Tensors&, Metadata& metadata) { metadata.clear(); });
  expect_refused({"model-rank-0.safetensors", "relatent_rank 0", "found nothing"});
  edit(0, [](Tensors&, Metadata& metadata) { metadata["relatent_tp"] = "8"; });
  expect_refused({"model-rank-0.safetensors", "relatent_tp 4", "found 8"});
}

TEST_F(Merge, TensorsThatAreNotThose) {
  edit(1, [](Tensors& tensors, Metadata&) { tensors.erase(keys); });
  expect_refused({"model-rank-1.safetensors", keys, "missing", "F32 [8, 24]"});
  edit(1, [](Tensors& tensors, Metadata&) { tensors.at(keys).shape = {24, 8}; });
  expect_refused({"model-rank-1.safetensors", keys, "expected F32 [8, 24]", "found F32 [24, 8]"});
  edit(1, [](Tensors& tensors, Metadata&) { tensors.at(keys).dtype = DType::i32; });
  expect_refused({"model-rank-1.safetensors", keys, "expected F32 [8, 24]", "found I32 [8, 24]"});
  edit(1, [](Tensors& tensors, Metadata&) { tensors["more"] = {DType::u8, {1}, "x"}; });
  expect_refused({"model-rank-1.safetensors", "tensor more", "not for this rank", "U8 [1]"});
}

TEST_F(Merge, BytesThatAreNotThose) {
  const auto flip = [](const char* name, std::size_t at) {
    return [=](Tensors& tensors, Metadata&) { tensors.at(name).bytes.at(at) ^= 1; };
  };
  // Ranks 2 and 3 read the same key/value head; all ranks have the norm.
  edit(3, flip(keys, 17));
  expect_refused({"model-rank-3.safetensors", keys, "copies differ", "model-rank-2.safetensors"});
  edit(0, flip(norm, 95));
  expect_refused({"model-rank-1.safetensors", norm, "copies differ", "model-rank-0.safetensors"});
  // One rank alone has these.
  edit(2, flip(output, 40));
  expect_refused({shards().string(), "not those that were cut", "fingerprint"});
}

TEST_F(Merge, ManifestsThatDoNotFitTogether) {
  const auto tensor = [](Json& json, const std::string& name) -> Json& {
    for (Json& entry : json["tensors"]) {
      if (entry["name"] == name) {
        return entry;
      }
    }
    throw std::logic_error(name);
  };
  // Files of another run, until they too are edited.
  const auto rewrite = [&](const std::function<void(Json&)>& change) {
    edit_manifest(manifest(), change);
    const std::string run = testing_support::run_in(manifest());
    for (Index k = 0; k < 4; ++k) {
      edit(k, [&](Tensors&, Metadata& metadata) { metadata["relatent_run"] = run; });
    }
  };
  edit_manifest(manifest(), [](Json& json) { json["layout"] = "else"; });
  expect_refused({"model-rank-0.safetensors", "relatent_run"});
  rewrite([&](Json& json) { tensor(json, keys)["ranks"] = {{0, 8}, {0, 8}, {0, 8}, {0, 8}}; });
  expect_refused({kShardsName, keys, "cover the tensor", "row 8"});
  rewrite([&](Json& json) { tensor(json, output)["split"] = "rows"; });
  expect_refused({output});
  rewrite([&](Json& json) { tensor(json, norm)["shape"] = {23}; });
  expect_refused({kShardsName, norm});
  rewrite([&](Json& json) { json["tensors"].push_back(tensor(json, norm)); });
  expect_refused({kShardsName, "the list of tensors"});
  rewrite([&](Json& json) { json["tensors"].erase(0); });
  expect_refused({kShardsName, "list of tensors differ"});
  rewrite([&](Json& json) { json["weights"][0]["bytes"] = 9; });
  expect_refused({kShardsName, "bytes of model.safetensors"});
  rewrite([&](Json& json) {
    json["weights"][0]["bytes"] = json["weights"][0]["bytes"].get<std::uint64_t>() - 1;
  });
  expect_refused({kShardsName, "truncated"});
  rewrite([&](Json& json) { json["weights"][0]["header"] = "{}"; });
  expect_refused({kShardsName});
  rewrite([&](Json& json) { json["weights"].push_back(json["weights"][0]); });
  expect_refused({kShardsName, "each file once"});
  rewrite([&](Json& json) { json["weights"] = Json::array(); });
  expect_refused({kShardsName, "the list of tensors"});
  rewrite([&](Json& json) { json["copied"].erase(0); });
  expect_refused({"config.json"});
  // A tensor of no rank, for which nobody should look for room.
  rewrite([&](Json& json) {
    const Index size = Index{1} << 44U;
    const std::string header =
        Json({{"more", {{"dtype", "U8"}, {"shape", {size}}, {"data_offsets", {0, size}}}}}).dump();
    json["weights"].push_back({{"file", "more.safetensors"},
                               {"bytes", kSafetensorsPrefix + header.size() + size},
                               {"header", header}});
    json["tensors"].push_back({{"name", "more"},
                               {"dtype", "U8"},
                               {"shape", {size}},
                               {"split", "whole"},
                               {"ranks", {nullptr, nullptr, nullptr, nullptr}}});
  });
  expect_refused({kShardsName, "more", "cover the tensor"});
}

TEST_F(Merge, TakenOutputIsUntouched) {
  const fs::path merged = folder_ / "merged";
  fs::create_directory(merged);
  write_text(merged / "precious", "data");
  expect_error(ErrorKind::usage, {merged.string(), "exists"},
               [&] { merge_shards(shards(), merged, ignore); });
  EXPECT_EQ(read_bytes(merged / "precious"), "data");
  EXPECT_FALSE(fs::exists(folder_ / "merged.partial"));
}

// Whatever is broken: one sentence, or the checkpoint as it was.
TEST_F(Merge, SurvivesEveryFlippedByteOfAHeader) {
  const std::string intact = read_bytes(rank(1));
  std::uint64_t header = 8 + SafetensorsFile::open(rank(1)).header_text().size();
  const std::string expected = read_bytes(folder_ / "source" / "model.safetensors");
  for (std::size_t at = 0; at < header; at += 7) {
    std::string damaged = intact;
    damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ (1U << at % 8));
    fs::remove(rank(1));
    write_text(rank(1), damaged);
    fs::remove_all(folder_ / "merged");
    try {
      merge_shards(shards(), folder_ / "merged", ignore);
      EXPECT_TRUE(read_bytes(folder_ / "merged" / "model.safetensors") == expected);
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::input);
    }
  }
}

}  // namespace
}  // namespace relatent
