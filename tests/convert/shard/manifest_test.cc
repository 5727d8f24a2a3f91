#include "convert/shard/manifest.h"

#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "formats/checkpoint.h"
#include "tests/support/expect_error.h"
#include "tests/support/shards.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::TempFolder;
using Json = nlohmann::ordered_json;

ShardManifest sample() {
  ShardManifest out;
  out.layout = "plain";
  out.tp = 2;
  out.fingerprint = "00ff";
  out.weights = {{"model.safetensors", 100, "{\"é\\n\": 1}\n "}};
  out.index = "{ }\n";
  out.copied = {{"config.json", 7, "0123"}};
  out.tensors = {{{"a", DType::bf16, {4, 6}}, Split::columns, {RankPart{0, 3}, RankPart{3, 3}}},
                 {{"b", DType::f32, {5}}, Split::rows, {RankPart{0, 2}, RankPart{2, 3}}},
                 {{"c", DType::u8, {3}}, Split::whole, {RankPart{0, 3}, std::nullopt}}};
  return out;
}

TEST(ShardManifest, RoundTrips) {
  const TempFolder folder;
  const ShardManifest written = sample();
  const std::filesystem::path path = folder.write(kShardsName, written.text());
  const ShardManifest read = ShardManifest::read(path);
  EXPECT_EQ(read.text(), written.text());
  EXPECT_EQ(read.run(), written.run());
  EXPECT_EQ(read.run().size(), 32U);
  EXPECT_EQ(read.tp, 2);
  EXPECT_EQ(read.weights.front().header, written.weights.front().header);
  EXPECT_EQ(read.index, written.index);
  EXPECT_EQ(read.tensors[0].axis(), 1U);
  EXPECT_EQ(read.tensors[0].slice(1).start, 3);
  EXPECT_EQ(read.tensors[1].part(1)->count, 3);
  EXPECT_FALSE(read.tensors[2].part(1));
  EXPECT_NE(
      written.text().find(R"({"name":"b","dtype":"F32","shape":[5],"split":"rows","ranks":[[0,2],[2,3]]})"),
      std::string::npos)
      << written.text();

  ShardManifest other = written;
  other.index.reset();
  EXPECT_EQ(ShardManifest::read(folder.write(kShardsName, other.text())).index, std::nullopt);
  EXPECT_NE(other.run(), written.run());
}

TEST(ShardManifest, NamesOfRanks) {
  EXPECT_EQ(rank_file_name(0), "model-rank-0.safetensors");
  EXPECT_EQ(rank_file_name(12), "model-rank-12.safetensors");
  EXPECT_EQ(rank_metadata("ab", 3, 8),
            (std::map<std::string, std::string>{
                {"relatent_rank", "3"}, {"relatent_run", "ab"}, {"relatent_tp", "8"}}));
}

TEST(ShardManifest, NoticesEveryChange) {
  const TempFolder folder;
  const std::string text = sample().text();
  std::mt19937 random(3);
  for (std::size_t at = 0; at + 1 < text.size(); ++at) {
    std::string damaged = text;
    damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ (1 + random() % 255));
    expect_error(ErrorKind::input, {kShardsName},
                 [&] { ShardManifest::read(folder.write(kShardsName, damaged)); });
    expect_error(ErrorKind::input, {kShardsName},
                 [&] { ShardManifest::read(folder.write(kShardsName, text.substr(0, at))); });
  }
  std::string damaged = text;
  damaged.replace(damaged.find("\"bytes\":7"), 9, "\"bytes\":8");
  expect_error(ErrorKind::input, {"changed", "expected run " + sample().run()},
               [&] { ShardManifest::read(folder.write(kShardsName, damaged)); });
}

TEST(ShardManifest, RefusesWhatMakesNoSense) {
  struct Case {
    std::function<void(Json&)> edit;
    std::vector<std::string> parts;
  };
  const auto tensor = [](std::size_t i, const char* key, const Json& value) {
    return [=](Json& json) { json["tensors"][i][key] = value; };
  };
  const std::vector<Case> cases = {
      {[](Json& json) { json["format"] = "other"; }, {"format", "relatent_shards", "other"}},
      {[](Json& json) { json.erase("format"); }, {"format", "found nothing"}},
      {[](Json& json) { json["version"] = 1; }, {"version", "expected 2", "found 1"}},
      {[](Json& json) { json["layout"] = 1; }, {"layout", "a string"}},
      {[](Json& json) { json["tp"] = 0; }, {"tp", "1 to 512"}},
      {[](Json& json) { json["tp"] = 513; }, {"tp", "1 to 512", "found 513"}},
      {[](Json& json) { json["tp"] = -1; }, {"tp", "whole number", "found -1"}},
      {[](Json& json) { json["tp"] = 1.5; }, {"tp", "whole number"}},
      {[](Json& json) { json["tp"] = 3; }, {"tensor a", "ranks", "each of 3 ranks"}},
      {[](Json& json) { json["fingerprint"] = nullptr; }, {"fingerprint", "a string", "null"}},
      {[](Json& json) { json["weights"] = Json::object(); }, {"weights", "a list"}},
      {[](Json& json) { json["weights"][0] = 3; }, {"an object", "found number"}},
      {[](Json& json) { json["weights"][0]["file"] = "../x"; }, {"file", "plain file name", "../x"}},
      {[](Json& json) { json["weights"][0]["file"] = ""; }, {"file", "plain file name"}},
      {[](Json& json) { json["weights"][0]["file"] = kIndexName; }, {"file", "each file once"}},
      {[](Json& json) { json["weights"][0]["bytes"] = -4; }, {"bytes", "whole number"}},
      {[](Json& json) { json["weights"][0]["bytes"] = UINT64_MAX; }, {"bytes", "whole number"}},
      {[](Json& json) { json["weights"][0].erase("header"); }, {"header", "a string"}},
      {[](Json& json) { json.erase("index"); }, {"index", "a string", "found nothing"}},
      {[](Json& json) { json["copied"][0]["file"] = "model.safetensors"; }, {"file", "each file once"}},
      {[](Json& json) { json["copied"][0]["file"] = "/etc/passwd"; }, {"file", "plain file name"}},
      {[](Json& json) { json["copied"][0]["checksum"] = 1; }, {"checksum", "a string"}},
      {[](Json& json) { json["tensors"][0].erase("name"); }, {"name", "a string"}},
      {tensor(0, "dtype", "F33"), {"tensor a", "dtype", "F33"}},
      {tensor(0, "shape", "big"), {"tensor a", "shape", "a list"}},
      {tensor(0, "shape", {4, -6}), {"tensor a", "shape", "whole numbers"}},
      {tensor(0, "shape", Json::array()), {"tensor a", "split", "[]"}},
      {tensor(0, "shape", {6}), {"tensor a", "split", "columns", "[6]"}},
      {tensor(0, "split", "diagonal"), {"tensor a", "split", "whole, rows or columns", "diagonal"}},
      {tensor(1, "ranks", {{0, 2}}), {"tensor b", "ranks", "each of 2 ranks"}},
      {tensor(1, "ranks", {{0, 2}, {4, 2}}), {"tensor b", "ranks", "within 5 rows"}},
      {tensor(1, "ranks", {{0, 2}, {INT64_MAX, INT64_MAX}}), {"tensor b", "ranks", "within 5 rows"}},
      {tensor(1, "ranks", {{0, 2}, {-1, 2}}), {"tensor b", "ranks", "start and count"}},
      {tensor(1, "ranks", {{0, 2}, 3}), {"tensor b", "ranks", "start and count"}},
      {tensor(1, "ranks", {{0, 2}, {0, 1, 2}}), {"tensor b", "ranks", "start and count"}},
  };
  const TempFolder folder;
  for (const Case& test : cases) {
    const std::filesystem::path path = folder.write(kShardsName, sample().text());
    testing_support::edit_manifest(path, test.edit);
    std::vector<std::string> parts = test.parts;
    parts.emplace_back(kShardsName);
    expect_error(ErrorKind::input, parts, [&] { ShardManifest::read(path); });
  }
  expect_error(ErrorKind::input, {"missing"}, [&] { ShardManifest::read(folder / "missing"); });
}

}  // namespace
}  // namespace relatent
