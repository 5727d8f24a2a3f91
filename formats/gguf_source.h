// A GGUF file (gguf.h) as a model's tensors.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "formats/gguf.h"
#include "formats/tensor_source.h"

namespace relatent {

class GgufSource final : public TensorSource {
 public:
  // Throws Error (input) as GgufFile::open does, for one of several files of a split model, and where keys,
  // texts outside of arrays or tensor names are not UTF-8.
  static GgufSource open(const std::filesystem::path& path);
  // Whether a regular file begins as GGUF files do.
  static bool is_one(const std::filesystem::path& path);

  const std::filesystem::path& path() const override { return file_.path(); }
  std::filesystem::path config_path() const override { return file_.path(); }
  // The metadata but for its arrays, by their keys: "deepseek2.block_count" and so on.
  const nlohmann::ordered_json& config() const override { return config_; }

  std::vector<std::string> tensor_names() const override;
  bool contains(const std::string& name) const override { return file_.find_tensor(name) != nullptr; }
  const TensorInfo& info(const std::string& name) const override;
  const std::filesystem::path& path_of(const std::string& name) const override;
  std::span<const std::byte> bytes(const std::string& name) const override { return file_.bytes(info(name)); }
  void release(const std::string& name) const override { file_.release(info(name)); }

 private:
  explicit GgufSource(GgufFile file);
  void require_utf8() const;

  GgufFile file_;
  nlohmann::ordered_json config_;
};

}  // namespace relatent
