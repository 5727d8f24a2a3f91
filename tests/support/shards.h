// Shards of a tiny model, and damage to them.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "convert/shard/manifest.h"
#include "formats/files.h"
#include "formats/hash.h"
#include "formats/json_text.h"
#include "tests/support/temp_folder.h"

namespace relatent::testing_support {

// Changes a manifest and gives it the run that belongs to its new content.
inline void edit_manifest(const std::filesystem::path& path,
                          const std::function<void(nlohmann::ordered_json&)>& edit) {
  nlohmann::ordered_json json = read_json_object(path, 1 << 20);
  json.erase("run");
  edit(json);
  Hasher hasher;
  hasher.add_text(json.dump());
  json["run"] = hasher.hexadecimal();
  write_text(path, json.dump());
}

inline std::string run_in(const std::filesystem::path& manifest) {
  return read_json_object(manifest, 1 << 20).at("run").get<std::string>();
}

struct StoredTensor {
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  std::string bytes;
};

// Changes a safetensors file: its tensors and its metadata.
inline void edit_tensors(const std::filesystem::path& path,
                         const std::function<void(std::map<std::string, StoredTensor>&,
                                                  std::map<std::string, std::string>&)>& edit) {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
  {
    const SafetensorsFile file = SafetensorsFile::open(path);
    metadata = file.metadata();
    metadata.erase("format");
    for (const TensorInfo& tensor : file.tensors()) {
      tensors[tensor.name] = {tensor.dtype, tensor.shape, text_of(file.bytes(tensor))};
    }
  }
  edit(tensors, metadata);
  std::vector<TensorSpec> specs;
  specs.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    specs.push_back({name, tensor.dtype, tensor.shape});
  }
  SafetensorsWriter writer(path, specs, metadata);
  for (const auto& [name, tensor] : tensors) {
    writer.write(name, bytes_of(tensor.bytes));
  }
  writer.finish();
}

}  // namespace relatent::testing_support
