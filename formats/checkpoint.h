// A Hugging Face checkpoint folder: config.json, one safetensors file or several with an index, and the files
// that travel with them (tokenizer, generation settings).
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "formats/file_identity.h"
#include "formats/safetensors.h"
#include "formats/tensor_sink.h"
#include "formats/tensor_source.h"

namespace relatent {

// What a conversion leaves beside its weights (convert/verify/conversion_report.h).
inline constexpr const char* kReportName = "conversion_report.json";
inline constexpr const char* kIndexName = "model.safetensors.index.json";
// More bytes than any checkpoint's index takes.
inline constexpr std::size_t kLargestIndex = std::size_t{256} << 20U;

class Checkpoint final : public TensorSource {
 public:
  // Reads config.json and every header; touches no weights. A folder needs model.safetensors, or
  // model.safetensors.index.json with its shards. Refused (Error, input): neither or both present, a missing
  // shard, a shard name that leaves the folder, a tensor that the index places in a shard that does not hold
  // it, a tensor in a shard that the index does not list or that two shards hold, config.json that is not a
  // JSON object.
  static Checkpoint open(const std::filesystem::path& folder);
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint() override;

  const std::filesystem::path& path() const override { return folder_; }
  const std::filesystem::path& folder() const { return folder_; }
  std::filesystem::path config_path() const override { return folder_ / "config.json"; }
  const nlohmann::ordered_json& config() const override { return *config_; }
  // Puts tensors of its rows, in order, in the place of one, without copying any. pieces: their names and
  // numbers of rows. The tensor is that of files() still. Throws Error (input) naming the tensor when it is
  // not there, has not as many rows, or a piece has the name of another tensor.
  void cut_rows(const std::string& name, const std::vector<std::pair<std::string, std::int64_t>>& pieces);
  // The weight files in order of their names.
  const std::vector<SafetensorsFile>& files() const { return files_; }
  // Nothing for a checkpoint of a single file, which needs no index.
  std::optional<std::filesystem::path> index_path() const;

  std::vector<std::string> tensor_names() const override;
  bool contains(const std::string& name) const override { return where_.contains(name); }
  const TensorInfo& info(const std::string& name) const override;
  const SafetensorsFile& file_of(const std::string& name) const;
  const std::filesystem::path& path_of(const std::string& name) const override {
    return file_of(name).path();
  }
  std::span<const std::byte> bytes(const std::string& name) const override;
  void release(const std::string& name) const override;

  // Throws Error (input) when config.json, the index or a weight file changed since the folder was opened.
  void require_unchanged() const { read_.require_unchanged(); }

  // What all weight files allow: for files that are made from them.
  FilePermissions weight_permissions() const;

  // Regular files of the folder that are neither config.json nor weights nor index: what a converted
  // checkpoint carries along untouched. Sorted; symbolic links to regular files count (hub caches are made of
  // them), hidden files, folders, *.bin, *.pt, *.pth, *.gguf, *.safetensors and *.index.json do not. Throws
  // Error (input) for a link that leads out of the folder, or out of the model's own part of a hub cache:
  // nobody wants a copy of what they do not see here.
  std::vector<std::filesystem::path> side_files() const;
  // The same, whatever links lead to: for those who only look at the files.
  std::vector<std::filesystem::path> linked_side_files() const;

 private:
  Checkpoint();
  // Opens the weight files and notes where every tensor lies. Throws Error (input) when two hold the same.
  void open_files(const std::set<std::string>& names);
  // Throws Error (input) unless the index, the shard of every tensor, says what the open files hold.
  void require_index(const std::map<std::string, std::string>& weight_map) const;

  std::filesystem::path folder_;
  ReadFiles read_;
  std::unique_ptr<nlohmann::ordered_json> config_;
  std::vector<SafetensorsFile> files_;
  bool has_index_ = false;
  std::vector<std::unique_ptr<const TensorInfo>> pieces_;  // of tensors that were cut
  std::map<std::string, std::pair<std::size_t, const TensorInfo*>> where_;
};

// Cuts tensors into shards of at most max_shard_bytes (a larger tensor gets a shard of its own), in the given
// order, and writes them into a folder with names and index as transformers expects: model.safetensors alone
// when one shard suffices, else model-00001-of-0000N.safetensors and model.safetensors.index.json (written by
// finish(), last).
class CheckpointWriter final : public TensorSink {
 public:
  CheckpointWriter(std::filesystem::path folder, const std::vector<TensorSpec>& specs,
                   std::uint64_t max_shard_bytes, FilePermissions permissions = {});
  // Goes on with the shards that an earlier process flushed into the folder, whose specs and limit were the
  // same; no tensor counts as written yet. What else lies in the folder is removed. nullptr when the shards
  // are not there or not those.
  static std::unique_ptr<CheckpointWriter> reopen(std::filesystem::path folder,
                                                  const std::vector<TensorSpec>& specs,
                                                  std::uint64_t max_shard_bytes,
                                                  FilePermissions permissions = {});
  void mark_written(const std::string& name) override { writer_of(name).mark_written(name); }
  std::string checksum(const std::string& name) const override { return writer_of(name).checksum(name); }
  std::string stored_checksum(const std::string& name) const override {
    return writer_of(name).stored_checksum(name);
  }
  void flush() override;
  void write(const std::string& name, std::span<const std::byte> bytes);
  void copy(const std::string& name, const Checkpoint& source, const std::string& source_name) override;
  void write_floats(const std::string& name, std::span<const float> values) override;
  void finish() override;
  std::uint64_t bytes_written() const override;

 private:
  CheckpointWriter(std::filesystem::path folder, FilePermissions permissions)
      : folder_(std::move(folder)), permissions_(permissions) {}
  // Decides which tensor goes where and names the shards.
  std::vector<std::vector<TensorSpec>> cut(const std::vector<TensorSpec>& specs,
                                           std::uint64_t max_shard_bytes);
  SafetensorsWriter& writer_of(const std::string& name) const;
  // All but shards on their way.
  void remove_others() const;

  std::filesystem::path folder_;
  FilePermissions permissions_;
  std::vector<std::unique_ptr<SafetensorsWriter>> writers_;
  std::vector<std::string> file_names_;
  std::map<std::string, std::size_t> shard_of_;
  std::map<std::string, TensorSpec> specs_;
};

}  // namespace relatent
