#include "convert/shard/shard.h"

#include <algorithm>
#include <chrono>
#include <memory>

#include "convert/model/model.h"
#include "convert/shard/layout.h"
#include "convert/shard/manifest.h"
#include "formats/error.h"
#include "formats/files.h"
#include "formats/json_text.h"
#include "formats/mapped_file.h"
#include "formats/resume.h"

namespace relatent {
namespace {

// config.json and the side files.
std::vector<std::filesystem::path> copied_files(const Checkpoint& checkpoint) {
  std::vector<std::filesystem::path> out = {checkpoint.config_path()};
  for (const std::filesystem::path& file : checkpoint.side_files()) {
    const std::string name = file.filename().string();
    // An index may give weight files any name.
    if (std::any_of(checkpoint.files().begin(), checkpoint.files().end(),
                    [&](const SafetensorsFile& weights) { return weights.path().filename() == name; })) {
      continue;
    }
    if (name == kShardsName) {
      fail_input({file, "", "has the name of the manifest that is to be written", "no such file", "one", ""});
    }
    if (!is_utf8(name)) {
      fail_input({file, "", "the file name is not valid UTF-8", "", "", "rename or remove the file"});
    }
    out.push_back(file);
  }
  return out;
}

ShardManifest manifest_of(const Checkpoint& checkpoint, const ShardOptions& options,
                          std::vector<ShardedTensor> tensors,
                          const std::vector<std::filesystem::path>& copied) {
  ShardManifest out;
  out.layout = options.layout;
  out.tp = options.tp;
  out.tensors = std::move(tensors);
  for (const SafetensorsFile& file : checkpoint.files()) {
    out.weights.push_back(
        {file.path().filename().string(), file.file_bytes(), std::string(file.header_text())});
  }
  if (checkpoint.index_path()) {
    out.index = read_text(*checkpoint.index_path(), kLargestIndex);
  }
  for (const std::filesystem::path& file : copied) {
    out.copied.push_back({file.filename().string(), std::filesystem::file_size(file), checksum_of(file)});
  }
  out.fingerprint = checkpoint.fingerprint();
  return out;
}

std::unique_ptr<SafetensorsWriter> make_writer(const std::filesystem::path& folder,
                                               const ShardManifest& manifest, const std::string& run,
                                               Index rank, FilePermissions permissions) {
  std::vector<TensorSpec> specs;
  for (const ShardedTensor& tensor : manifest.tensors) {
    if (tensor.part(rank)) {
      specs.push_back({tensor.spec.name, tensor.spec.dtype, shape_of(tensor.slice(rank), tensor.spec.shape)});
    }
  }
  return std::make_unique<SafetensorsWriter>(folder / rank_file_name(rank), std::move(specs),
                                             rank_metadata(run, rank, manifest.tp), permissions);
}

}  // namespace

ShardReport write_shards(const ShardOptions& options, const ShardProgress& progress) {
  const auto start = std::chrono::steady_clock::now();
  const ShardLayout* layout = find_shard_layout(options.layout);
  if (layout == nullptr) {
    fail_usage("--layout " + options.layout + " is not one of: " + known_shard_layouts());
  }
  const Model model = Model::open(options.source);
  const Checkpoint& checkpoint = model.folder("sharded");
  RunIdentity before;
  add_source_identity(checkpoint, before);
  std::vector<ShardedTensor> tensors = sharded_tensors(model, *layout, options.tp);
  const std::vector<std::filesystem::path> copied = copied_files(checkpoint);
  PendingFolder folder(options.output);
  const ShardManifest manifest = manifest_of(checkpoint, options, std::move(tensors), copied);
  const std::string text = manifest.text();

  ShardReport report;
  report.run = manifest.run();
  report.tp = options.tp;
  const FilePermissions permissions = checkpoint.weight_permissions();
  std::vector<std::unique_ptr<SafetensorsWriter>> writers;
  for (Index rank = 0; rank < options.tp; ++rank) {
    writers.push_back(make_writer(folder.staging(), manifest, report.run, rank, permissions));
    report.files.push_back({rank_file_name(rank), writers.back()->file_bytes()});
  }
  // Tensor by tensor rather than rank by rank, so that the checkpoint is read from front to back.
  Index done = 0;
  for (const ShardedTensor& tensor : manifest.tensors) {
    const std::string& name = tensor.spec.name;
    for (Index rank = 0; rank < options.tp; ++rank) {
      if (tensor.part(rank)) {
        writers[static_cast<std::size_t>(rank)]->copy_slice(name, checkpoint.file_of(name),
                                                            checkpoint.info(name), tensor.slice(rank));
      }
    }
    progress(++done, static_cast<Index>(manifest.tensors.size()));
  }
  for (const std::unique_ptr<SafetensorsWriter>& writer : writers) {
    writer->finish();
  }
  for (std::size_t i = 0; i < copied.size(); ++i) {
    copy_as_listed(copied[i], folder.staging() / copied[i].filename(), manifest.copied[i].checksum);
  }
  RunIdentity now;
  add_source_identity(checkpoint, now);
  require_unchanged(before, now);
  write_text(folder.staging() / kShardsName, text, permissions);
  folder.commit();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace relatent
