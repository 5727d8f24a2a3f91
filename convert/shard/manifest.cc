#include "convert/shard/manifest.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <utility>

#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/files.h"
#include "formats/hash.h"
#include "formats/json_text.h"
#include "formats/mapped_file.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* manifest_format = "relatent_shards";
constexpr std::int64_t manifest_version = 2;
constexpr std::size_t largest_manifest = 2 * kLargestIndex;
constexpr std::array<std::pair<Split, const char*>, 3> split_names = {
    {{Split::whole, "whole"}, {Split::rows, "rows"}, {Split::columns, "columns"}}};

const char* split_name(Split split) {
  for (const auto& [known, name] : split_names) {
    if (known == split) {
      return name;
    }
  }
  return "";
}

Json to_json(const ShardedTensor& tensor) {
  Json ranks = Json::array();
  for (const std::optional<RankPart>& part : tensor.ranks) {
    ranks.push_back(part ? Json({part->start, part->count}) : Json(nullptr));
  }
  return {{"name", tensor.spec.name},
          {"dtype", safetensors_name(tensor.spec.dtype)},
          {"shape", tensor.spec.shape},
          {"split", split_name(tensor.split)},
          {"ranks", std::move(ranks)}};
}

// Everything but the run.
Json to_json(const ShardManifest& manifest) {
  Json out = {{"format", manifest_format},
              {"version", manifest_version},
              {"layout", manifest.layout},
              {"tp", manifest.tp},
              {"fingerprint", manifest.fingerprint}};
  out["weights"] = Json::array();
  for (const WeightFile& file : manifest.weights) {
    out["weights"].push_back({{"file", file.name}, {"bytes", file.bytes}, {"header", file.header}});
  }
  out["index"] = manifest.index ? Json(*manifest.index) : Json(nullptr);
  out["copied"] = Json::array();
  for (const CopiedFile& file : manifest.copied) {
    out["copied"].push_back({{"file", file.name}, {"bytes", file.bytes}, {"checksum", file.checksum}});
  }
  out["tensors"] = Json::array();
  for (const ShardedTensor& tensor : manifest.tensors) {
    out["tensors"].push_back(to_json(tensor));
  }
  return out;
}

std::string run_of(const Json& without_run) {
  Hasher hasher;
  hasher.add_text(without_run.dump());
  return hasher.hexadecimal();
}

// One object of the manifest, of which every member must be what it should.
class Reader {
 public:
  Reader(const Json& object, const std::filesystem::path& path, std::string tensor = "")
      : object_(object), path_(path), tensor_(std::move(tensor)) {
    if (!object.is_object()) {
      fail_input({path, tensor_, "an entry", "an object", object.type_name(), ""});
    }
  }

  const Json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() ? nullptr : &*it;
  }
  std::string text(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || !value->is_string()) {
      complain(key, "a string");
    }
    return value->get<std::string>();
  }
  std::int64_t count(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || !is_count(*value)) {
      complain(key, "a whole number");
    }
    return value->get<std::int64_t>();
  }
  const Json& list(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || !value->is_array()) {
      complain(key, "a list");
    }
    return *value;
  }
  std::vector<std::int64_t> counts(const char* key) const {
    std::vector<std::int64_t> out;
    for (const Json& value : list(key)) {
      if (!is_count(value)) {
        complain(key, "a list of whole numbers");
      }
      out.push_back(value.get<std::int64_t>());
    }
    return out;
  }
  std::string file_name(const char* key, std::set<std::string>& used) const {
    std::string name = text(key);
    if (!is_plain_name(name)) {
      complain(key, "a plain file name");
    }
    if (!used.insert(name).second) {
      complain(key, "each file once");
    }
    return name;
  }
  [[noreturn]] void complain(const char* key, const std::string& expected) const {
    const Json* value = find(key);
    fail_input({path_, tensor_, key, expected, value == nullptr ? "nothing" : value->dump(), ""});
  }

  static bool is_count(const Json& value) {
    return value.is_number_unsigned() && std::in_range<std::int64_t>(value.get<std::uint64_t>());
  }

 private:
  const Json& object_;
  const std::filesystem::path& path_;
  std::string tensor_;
};

std::vector<std::optional<RankPart>> read_ranks(const Reader& in, const ShardedTensor& tensor, Index tp) {
  const char* key = "ranks";
  const Json& list = in.list(key);
  if (list.size() != static_cast<std::size_t>(tp)) {
    in.complain(key, "an entry for each of " + std::to_string(tp) + " ranks");
  }
  if (tensor.axis() >= tensor.spec.shape.size()) {
    in.complain("split", "rows or columns of the shape " + shape_text(tensor.spec.shape));
  }
  const std::int64_t size = tensor.spec.shape[tensor.axis()];
  std::vector<std::optional<RankPart>> out;
  for (const Json& entry : list) {
    if (entry.is_null()) {
      out.emplace_back();
      continue;
    }
    if (!entry.is_array() || entry.size() != 2 || !Reader::is_count(entry[0]) ||
        !Reader::is_count(entry[1])) {
      in.complain(key, "start and count, or null, for each rank");
    }
    const RankPart part{entry[0].get<std::int64_t>(), entry[1].get<std::int64_t>()};
    if (part.count > size || part.start > size - part.count) {
      in.complain(key, "parts within " + std::to_string(size) + " " +
                           (tensor.split == Split::columns ? "columns" : "rows"));
    }
    out.emplace_back(part);
  }
  return out;
}

ShardedTensor read_tensor(const Json& entry, const std::filesystem::path& path, Index tp) {
  ShardedTensor out;
  out.spec.name = Reader(entry, path).text("name");
  const Reader in(entry, path, out.spec.name);
  const std::optional<DType> dtype = dtype_from_safetensors(in.text("dtype"));
  if (!dtype) {
    in.complain("dtype", "a safetensors dtype");
  }
  out.spec.dtype = *dtype;
  out.spec.shape = in.counts("shape");
  const std::string split = in.text("split");
  const auto* const found = std::find_if(split_names.begin(), split_names.end(),
                                         [&](const auto& known) { return known.second == split; });
  if (found == split_names.end()) {
    in.complain("split", "whole, rows or columns");
  }
  out.split = found->first;
  out.ranks = read_ranks(in, out, tp);
  return out;
}

}  // namespace

std::string rank_file_name(Index rank) {
  return "model-rank-" + std::to_string(rank) + ".safetensors";
}

std::map<std::string, std::string> rank_metadata(const std::string& run, Index rank, Index tp) {
  return {{"relatent_run", run}, {kRankKey, std::to_string(rank)}, {"relatent_tp", std::to_string(tp)}};
}

std::string ShardManifest::run() const {
  return run_of(to_json(*this));
}

std::string ShardManifest::text() const {
  Json out = to_json(*this);
  out["run"] = run_of(out);
  return out.dump() + "\n";
}

ShardManifest ShardManifest::read(const std::filesystem::path& path) {
  Json json = read_json_object(path, largest_manifest);
  ShardManifest out;
  {
    const Reader in(json, path);
    if (in.text("format") != manifest_format) {
      in.complain("format", std::string("\"") + manifest_format + "\"");
    }
    if (in.count("version") != manifest_version) {
      in.complain("version", std::to_string(manifest_version));
    }
    const std::string run = in.text("run");
    json.erase("run");
    const std::string found = run_of(json);
    if (found != run) {
      fail_input({path, "", "was changed after the shards were written", "run " + run, found, ""});
    }
  }
  const Reader in(json, path);
  out.layout = in.text("layout");
  out.tp = in.count("tp");
  if (out.tp < 1 || out.tp > kMostRanks) {
    in.complain("tp", "1 to " + std::to_string(kMostRanks));
  }
  out.fingerprint = in.text("fingerprint");
  std::set<std::string> used = {kIndexName};
  for (const Json& entry : in.list("weights")) {
    const Reader file(entry, path);
    out.weights.push_back(
        {file.file_name("file", used), static_cast<std::uint64_t>(file.count("bytes")), file.text("header")});
  }
  if (in.find("index") == nullptr || !in.find("index")->is_null()) {
    out.index = in.text("index");
  }
  for (const Json& entry : in.list("copied")) {
    const Reader file(entry, path);
    out.copied.push_back({file.file_name("file", used), static_cast<std::uint64_t>(file.count("bytes")),
                          file.text("checksum")});
  }
  for (const Json& entry : in.list("tensors")) {
    out.tensors.push_back(read_tensor(entry, path, out.tp));
  }
  return out;
}

void copy_as_listed(const std::filesystem::path& source, const std::filesystem::path& target,
                    const std::string& checksum) {
  copy_whole_file(source, target);
  if (const std::string found = checksum_of(target); found != checksum) {
    fail_input({source, "", "changed while it was copied", "checksum " + checksum, found, ""});
  }
}

}  // namespace relatent
