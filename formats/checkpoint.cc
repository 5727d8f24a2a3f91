#include "formats/checkpoint.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "formats/error.h"
#include "formats/json_text.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

constexpr std::size_t kLargestConfig = std::size_t{16} << 20U;
constexpr const char* kSingleName = "model.safetensors";

// Whether there is anything of that name; a broken link counts as nothing.
bool is_there(const std::filesystem::path& path) {
  std::error_code error;
  const bool there = std::filesystem::exists(path, error);
  if (error) {
    fail_system(path, "cannot examine", error.value());
  }
  return there;
}

// The shard of every tensor, as the index has it.
std::map<std::string, std::string> read_weight_map(const std::filesystem::path& index_path) {
  const nlohmann::ordered_json index = read_json_object(index_path, kLargestIndex);
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    fail_input({.file = index_path,
                .problem = "weight_map",
                .expected = "an object that names a shard for every tensor",
                .found = weight_map == index.end() ? "nothing"
                         : weight_map->is_object() ? "an empty object"
                                                   : weight_map->type_name()});
  }
  std::map<std::string, std::string> shard_of;
  for (const auto& [tensor, shard] : weight_map->items()) {
    if (!shard.is_string()) {
      fail_input({.file = index_path,
                  .tensor = tensor,
                  .problem = "weight_map",
                  .expected = "a file name",
                  .found = shard.type_name()});
    }
    const auto& name = shard.get_ref<const std::string&>();
    if (!is_plain_name(name)) {
      fail_input({.file = index_path,
                  .tensor = tensor,
                  .problem = "weight_map names a shard outside the folder",
                  .expected = "a plain file name",
                  .found = "\"" + name + "\""});
    }
    shard_of.emplace(tensor, name);
  }
  return shard_of;
}

// The shards that an index names. Throws Error (input) for one that the folder lacks.
std::set<std::string> shards_of(const std::filesystem::path& folder,
                                const std::map<std::string, std::string>& weight_map) {
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : weight_map) {
    if (shards.insert(shard).second && !is_there(folder / shard)) {
      fail_input({.file = folder / kIndexName,
                  .tensor = tensor,
                  .problem = "a shard is missing",
                  .expected = shard,
                  .found = "no such file"});
    }
  }
  return shards;
}

bool ends_with_any(const std::string& name, std::initializer_list<std::string_view> endings) {
  return std::any_of(endings.begin(), endings.end(),
                     [&name](std::string_view ending) { return name.ends_with(ending); });
}

std::filesystem::path without_links(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::path out = std::filesystem::canonical(path, error);
  if (error) {
    fail_system(path, "cannot follow the links", error.value());
  }
  return out;
}

bool is_inside(const std::filesystem::path& folder, const std::filesystem::path& path) {
  return std::mismatch(folder.begin(), folder.end(), path.begin(), path.end()).first == folder.end();
}

// Where a hub cache keeps the files that models--NAME/snapshots/REVISION links to; empty for other folders.
std::filesystem::path blobs_of(const std::filesystem::path& folder) {
  const std::filesystem::path snapshots = folder.parent_path();
  const std::filesystem::path model = snapshots.parent_path();
  const bool cached =
      snapshots.filename() == "snapshots" && model.filename().string().starts_with("models--");
  return cached ? model / "blobs" : std::filesystem::path();
}

// Throws Error (input) when the file of the checkpoint's folder is a link to one that does not belong to it.
void require_own_file(const std::filesystem::path& folder, const std::filesystem::path& file) {
  if (!std::filesystem::is_symlink(file)) {
    return;
  }
  const std::filesystem::path home = without_links(folder);
  const std::filesystem::path target = without_links(file);
  const std::filesystem::path blobs = blobs_of(home);
  if (!is_inside(home, target) && (blobs.empty() || !is_inside(blobs, target))) {
    fail_input({.file = file,
                .problem = "is a link to " + target.string() +
                           ", outside of the checkpoint, and would be copied into the output",
                .next_step = "put a copy of the file there, or remove the link"});
  }
}

std::string shard_name(std::size_t shard, std::size_t shards) {
  const auto padded = [](std::size_t number) {
    std::string digits = std::to_string(number);
    digits.insert(0, digits.size() < 5 ? 5 - digits.size() : 0, '0');
    return digits;
  };
  return "model-" + padded(shard + 1) + "-of-" + padded(shards) + ".safetensors";
}

}  // namespace

Checkpoint::Checkpoint() = default;
// The pointers in where_ lead to the heap blocks of files_, which a move hands over as they are.
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

Checkpoint Checkpoint::open(const std::filesystem::path& folder) {
  Checkpoint checkpoint;
  checkpoint.folder_ = folder;
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) {
    if (error) {
      fail_system(folder, "cannot open the checkpoint", error.value());
    }
    fail_input({.file = folder,
                .expected = "a checkpoint folder",
                .found = is_there(folder) ? "a file" : "nothing"});
  }
  checkpoint.read_.note(checkpoint.config_path());
  checkpoint.config_ =
      std::make_unique<nlohmann::ordered_json>(read_json_object(checkpoint.config_path(), kLargestConfig));

  checkpoint.has_index_ = is_there(folder / kIndexName);
  const bool has_single = is_there(folder / kSingleName);
  if (checkpoint.has_index_ == has_single) {
    fail_input({.file = folder,
                .problem = "weights",
                .expected = std::string("either ") + kSingleName + " or " + kIndexName,
                .found = has_single ? "both" : "neither"});
  }
  if (has_single) {
    checkpoint.open_files({kSingleName});
    return checkpoint;
  }
  checkpoint.read_.note(folder / kIndexName);
  const std::map<std::string, std::string> weight_map = read_weight_map(folder / kIndexName);
  checkpoint.open_files(shards_of(folder, weight_map));
  checkpoint.require_index(weight_map);
  return checkpoint;
}

void Checkpoint::open_files(const std::set<std::string>& names) {
  for (const std::string& name : names) {
    read_.note(folder_ / name);
    files_.push_back(SafetensorsFile::open(folder_ / name));
  }
  for (std::size_t i = 0; i < files_.size(); ++i) {
    const SafetensorsFile& file = files_[i];
    for (const TensorInfo& tensor : file.tensors()) {
      const auto [place, is_new] = where_.try_emplace(tensor.name, i, &tensor);
      if (!is_new) {
        fail_input({.file = file.path(),
                    .tensor = tensor.name,
                    .problem = "is in two shards, also in " +
                               files_[place->second.first].path().filename().string()});
      }
    }
  }
}

void Checkpoint::require_index(const std::map<std::string, std::string>& weight_map) const {
  for (const auto& [tensor, shard] : weight_map) {
    const auto place = where_.find(tensor);
    if (place == where_.end() || files_[place->second.first].path().filename() != shard) {
      fail_input({.file = folder_ / kIndexName,
                  .tensor = tensor,
                  .problem = "is not where the index says",
                  .expected = shard,
                  .found = place == where_.end() ? "it in no shard"
                                                 : files_[place->second.first].path().filename().string()});
    }
  }
  for (const auto& [tensor, place] : where_) {
    if (!weight_map.contains(tensor)) {
      fail_input({.file = files_[place.first].path(),
                  .tensor = tensor,
                  .problem = std::string("is not listed in ") + kIndexName});
    }
  }
}

void Checkpoint::cut_rows(const std::string& name,
                          const std::vector<std::pair<std::string, std::int64_t>>& pieces) {
  const TensorInfo& whole = info(name);
  const std::size_t file = where_.at(name).first;
  std::int64_t rows = 0;
  for (const auto& [piece, count] : pieces) {
    rows += count;
  }
  if (whole.shape.empty() || whole.shape.front() != rows) {
    fail_input({.file = path_of(name),
                .tensor = name,
                .problem = "shape",
                .expected = std::to_string(rows) + " rows by config.json",
                .found = shape_text(whole.shape)});
  }
  where_.erase(name);
  const std::uint64_t row_bytes = rows > 0 ? whole.bytes / static_cast<std::uint64_t>(rows) : 0;
  std::uint64_t offset = whole.offset;
  for (const auto& [piece, count] : pieces) {
    TensorInfo info = whole;
    info.name = piece;
    info.shape.front() = count;
    info.offset = offset;
    info.bytes = static_cast<std::uint64_t>(count) * row_bytes;
    offset += info.bytes;
    pieces_.push_back(std::make_unique<const TensorInfo>(std::move(info)));
    if (!where_.try_emplace(piece, file, pieces_.back().get()).second) {
      fail_input({.file = files_[file].path(), .tensor = piece, .problem = "is there beside " + name});
    }
  }
}

std::optional<std::filesystem::path> Checkpoint::index_path() const {
  return has_index_ ? std::optional(folder_ / kIndexName) : std::nullopt;
}

std::vector<std::string> Checkpoint::tensor_names() const {
  std::vector<std::string> names;
  names.reserve(where_.size());
  for (const auto& [name, place] : where_) {
    names.push_back(name);
  }
  return names;
}

const TensorInfo& Checkpoint::info(const std::string& name) const {
  const auto found = where_.find(name);
  if (found == where_.end()) {
    fail_input({.file = folder_, .tensor = name, .problem = "there is no such tensor"});
  }
  return *found->second.second;
}

const SafetensorsFile& Checkpoint::file_of(const std::string& name) const {
  static_cast<void>(info(name));  // complains about an unknown name
  return files_[where_.at(name).first];
}

std::span<const std::byte> Checkpoint::bytes(const std::string& name) const {
  return file_of(name).bytes(info(name));
}

void Checkpoint::release(const std::string& name) const {
  file_of(name).release(info(name));
}

FilePermissions Checkpoint::weight_permissions() const {
  return common_permissions(files_);
}

std::vector<std::filesystem::path> Checkpoint::side_files() const {
  std::vector<std::filesystem::path> files = linked_side_files();
  for (const std::filesystem::path& file : files) {
    require_own_file(folder_, file);
  }
  return files;
}

std::vector<std::filesystem::path> Checkpoint::linked_side_files() const {
  std::vector<std::filesystem::path> files;
  for (const std::filesystem::path& entry : entries_of(folder_)) {
    const std::string name = entry.filename().string();
    std::error_code unreadable;  // a broken link is no regular file, and no reason to stop
    if (!name.starts_with('.') && name != "config.json" &&
        !ends_with_any(name, {".bin", ".pt", ".pth", ".gguf", ".safetensors", ".index.json"}) &&
        std::filesystem::is_regular_file(entry, unreadable)) {
      files.push_back(entry);
    }
  }
  return files;
}

std::vector<std::vector<TensorSpec>> CheckpointWriter::cut(const std::vector<TensorSpec>& specs,
                                                           std::uint64_t max_shard_bytes) {
  std::vector<std::vector<TensorSpec>> shards(1);
  std::uint64_t filled = 0;
  for (const TensorSpec& spec : specs) {
    const std::uint64_t size = spec.bytes();
    if (!shards.back().empty() && (filled > max_shard_bytes || size > max_shard_bytes - filled)) {
      shards.emplace_back();
      filled = 0;
    }
    if (!specs_.emplace(spec.name, spec).second) {
      throw std::invalid_argument("tensor name used twice: " + spec.name);
    }
    shard_of_.emplace(spec.name, shards.size() - 1);
    shards.back().push_back(spec);
    filled += size;
  }
  for (std::size_t i = 0; i < shards.size(); ++i) {
    file_names_.push_back(shards.size() == 1 ? kSingleName : shard_name(i, shards.size()));
  }
  return shards;
}

CheckpointWriter::CheckpointWriter(std::filesystem::path folder, const std::vector<TensorSpec>& specs,
                                   std::uint64_t max_shard_bytes, FilePermissions permissions)
    : folder_(std::move(folder)), permissions_(permissions) {
  std::vector<std::vector<TensorSpec>> shards = cut(specs, max_shard_bytes);
  for (std::size_t i = 0; i < shards.size(); ++i) {
    writers_.push_back(std::make_unique<SafetensorsWriter>(
        folder_ / file_names_[i], std::move(shards[i]), std::map<std::string, std::string>{}, permissions_));
  }
}

std::unique_ptr<CheckpointWriter> CheckpointWriter::reopen(std::filesystem::path folder,
                                                           const std::vector<TensorSpec>& specs,
                                                           std::uint64_t max_shard_bytes,
                                                           FilePermissions permissions) {
  // Not make_unique: the constructor is private.
  std::unique_ptr<CheckpointWriter> out(new CheckpointWriter(std::move(folder), permissions));
  std::vector<std::vector<TensorSpec>> shards = out->cut(specs, max_shard_bytes);
  for (std::size_t i = 0; i < shards.size(); ++i) {
    out->writers_.push_back(
        SafetensorsWriter::reopen(out->folder_ / out->file_names_[i], std::move(shards[i]), permissions));
    if (!out->writers_.back()) {
      return nullptr;
    }
  }
  out->remove_others();
  return out;
}

void CheckpointWriter::remove_others() const {
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    const std::string name = entry.path().filename().string();
    const bool own = std::any_of(file_names_.begin(), file_names_.end(),
                                 [&](const std::string& file) { return name == file + ".partial"; });
    if (!own) {
      std::filesystem::remove_all(entry.path());
    }
  }
}

void CheckpointWriter::flush() {
  const Stage stage("flush");
  for (const std::unique_ptr<SafetensorsWriter>& writer : writers_) {
    writer->flush();
  }
  flush_folder(folder_);
}

SafetensorsWriter& CheckpointWriter::writer_of(const std::string& name) const {
  const auto found = shard_of_.find(name);
  if (found == shard_of_.end()) {
    throw std::invalid_argument("tensor " + name + " was not announced to " + folder_.string());
  }
  return *writers_[found->second];
}

void CheckpointWriter::write(const std::string& name, std::span<const std::byte> bytes) {
  writer_of(name).write(name, bytes);
}

void CheckpointWriter::copy(const std::string& name, const Checkpoint& source,
                            const std::string& source_name) {
  writer_of(name).copy(name, source, source_name);
}

void CheckpointWriter::write_floats(const std::string& name, std::span<const float> values) {
  writer_of(name).write_floats(name, values);
}

void CheckpointWriter::finish() {
  const Stage stage("flush");
  for (const std::unique_ptr<SafetensorsWriter>& writer : writers_) {
    writer->finish();
  }
  if (writers_.size() == 1) {
    return;
  }
  // transformers takes total_size for the bytes of the tensors alone.
  std::uint64_t total = 0;
  nlohmann::json weight_map = nlohmann::json::object();
  for (const auto& [name, shard] : shard_of_) {
    total += specs_.at(name).bytes();
    weight_map[name] = file_names_[shard];
  }
  const nlohmann::json index = {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}};
  write_text(folder_ / kIndexName, index.dump(2) + "\n", permissions_);
}

std::uint64_t CheckpointWriter::bytes_written() const {
  std::uint64_t sum = 0;
  for (const std::unique_ptr<SafetensorsWriter>& writer : writers_) {
    sum += writer->file_bytes();
  }
  return sum;
}

}  // namespace relatent
