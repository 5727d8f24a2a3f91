// A folder of shards, put together again (convert/shard/shard.h). The manifest's checksum names the run,
// which every rank's file repeats: the mutator puts both right again.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "convert/shard/manifest.h"
#include "convert/shard/shard.h"
#include "formats/hash.h"
#include "tests/attack/fuzz/fuzz.h"

namespace {

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {relatent::kShardsName, relatent::rank_file_name(0),
                                               relatent::rank_file_name(1), "config.json", "README.md"};
  return all;
}

// The run is a text of 32 digits wherever it stands, so no length changes with it.
void repair_run(relatent::fuzz::Files& files) {
  const auto manifest = files.find(relatent::kShardsName);
  if (manifest == files.end()) {
    return;
  }
  nlohmann::ordered_json json = relatent::fuzz::any_json(manifest->second);
  if (!json.is_object()) {
    return;
  }
  const auto old = json.find("run");
  const std::string before = old != json.end() && old->is_string() ? old->get<std::string>() : "";
  json.erase("run");
  relatent::Hasher hasher;
  hasher.add_text(json.dump());
  const std::string run = hasher.hexadecimal();
  json["run"] = run;
  manifest->second = json.dump();
  for (auto& [name, bytes] : files) {
    const std::size_t at = before.size() == run.size() ? bytes.find(before) : std::string::npos;
    if (name.starts_with("model-rank-") && at != std::string::npos) {
      bytes.replace(at, run.size(), run);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::filesystem::path shards = fuzz::folder() / "shards";
  const std::filesystem::path merged = fuzz::folder() / "merged";
  std::filesystem::remove_all(shards);
  std::filesystem::remove_all(merged);
  std::filesystem::create_directory(shards);
  for (const auto& [name, bytes] : fuzz::split_files(fuzz::text_of(data, size), names())) {
    fuzz::put("shards/" + name, bytes);
  }
  const bool whole = fuzz::reads([&] { merge_shards(shards, merged, [](Index /*done*/, Index /*all*/) {}); });
  fuzz::require(std::filesystem::exists(merged) == whole, "an output that does not go with the error");
  fuzz::require(!std::filesystem::exists(fuzz::folder() / "merged.partial"),
                "an output that was left half way");
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  using namespace relatent;
  fuzz::Files files =
      fuzz::split_files(fuzz::mutated_files(fuzz::text_of(data, size), names(), max_size, seed), names());
  if (fuzz::repairs(seed)) {
    repair_run(files);
  }
  return fuzz::hand_over(fuzz::join_files(files), data, max_size);
}
