// One file per tensor-parallel rank, and the checkpoint again from all of them. Bytes are never decoded.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "linalg/matrix.h"

namespace relatent {

struct ShardOptions {
  std::filesystem::path source;
  std::filesystem::path output;
  Index tp = 0;
  std::string layout = "plain";
};

struct WrittenFile {
  std::string name;
  std::uint64_t bytes = 0;
};

struct ShardReport {
  std::string run;  // names this cut; every rank's file carries it
  Index tp = 0;
  std::vector<WrittenFile> files;  // with weights: one per rank, or the checkpoint's own
  double seconds = 0;
};

// Tensors done of all.
using ShardProgress = std::function<void(Index done, Index all)>;

// Writes a new folder with model-rank-{k}.safetensors for each rank k, holding what that rank needs
// (layout.h), with metadata relatent_run, relatent_rank and relatent_tp; relatent_shards.json (manifest.h);
// and config.json and the side files as they are. The same checkpoint gives the same bytes. Reads the
// checkpoint twice, once for its fingerprint. Throws Error: usage when the layout is unknown, when tp ranks
// cannot share the model, or when the output exists; input when the checkpoint is not what it should be or
// has a side file whose name is taken; machine when writing fails. On any error nothing is left.
ShardReport write_shards(const ShardOptions& options, const ShardProgress& progress);

// Writes the checkpoint that write_shards cut, every file as it was, and reads it once more to see that it
// has the fingerprint of what was cut. Throws Error: usage when the output exists; input when a file is
// missing or of another run or rank, when a tensor has another dtype or shape than the manifest says, when
// copies of a tensor differ between ranks, or when the weights are others; machine when writing fails. On any
// error nothing is left.
ShardReport merge_shards(const std::filesystem::path& shards, const std::filesystem::path& output,
                         const ShardProgress& progress);

}  // namespace relatent
