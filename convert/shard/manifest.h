// relatent_shards.json: what was cut into which rank's file, and what puts the checkpoint together again.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "formats/safetensors.h"
#include "linalg/matrix.h"

namespace relatent {

inline constexpr const char* kShardsName = "relatent_shards.json";
// Every rank is a file of its own, all of them open at once.
inline constexpr Index kMostRanks = 512;

// "model-rank-3.safetensors"
std::string rank_file_name(Index rank);

// What a rank's file says of itself: {"relatent_run": run, "relatent_rank": "3", "relatent_tp": "8"}.
inline constexpr const char* kRankKey = "relatent_rank";
std::map<std::string, std::string> rank_metadata(const std::string& run, Index rank, Index tp);

// The direction in which a tensor is cut. whole: some ranks, or all, have all of it.
enum class Split { whole, rows, columns };

// Rows (of a whole tensor too) or columns start ... start + count - 1.
struct RankPart {
  std::int64_t start = 0;
  std::int64_t count = 0;
};

// A tensor of the checkpoint and what of it each rank has.
struct ShardedTensor {
  TensorSpec spec;
  Split split = Split::whole;
  std::vector<std::optional<RankPart>> ranks;  // nothing where a rank does not need it

  std::size_t axis() const { return split == Split::columns ? 1 : 0; }
  const std::optional<RankPart>& part(Index rank) const { return ranks[static_cast<std::size_t>(rank)]; }
  // What a rank has, as a slice of the tensor; the rank must have a part.
  TensorSlice slice(Index rank) const { return {axis(), part(rank)->start, part(rank)->count}; }
};

// A weight file of the checkpoint: all of it but the data.
struct WeightFile {
  std::string name;
  std::uint64_t bytes = 0;  // of the whole file
  std::string header;       // JSON text with its padding
};

// A file that lies in the folder of shards as it is.
struct CopiedFile {
  std::string name;
  std::uint64_t bytes = 0;
  std::string checksum;
};

struct ShardManifest {
  std::string layout;
  Index tp = 0;
  std::string fingerprint;  // Checkpoint::fingerprint of what was cut
  std::vector<WeightFile> weights;
  std::optional<std::string> index;  // text of the checkpoint's index, where it has one
  std::vector<CopiedFile> copied;    // config.json and side files
  std::vector<ShardedTensor> tensors;

  // The run's name, which every rank's file carries: a checksum of all the rest, and so of the weights.
  std::string run() const;
  // JSON on one line.
  std::string text() const;
  // Throws Error (input) naming the file and what is wrong with it: no manifest of a known version, a run
  // that is not the checksum of the rest, sizes that do not fit together, names that leave the folder or are
  // used twice. All tensors' parts lie within their shapes; whether they cover them is not looked at.
  static ShardManifest read(const std::filesystem::path& path);
};

// Copies a file that has this checksum. Throws Error: input when the copy has another, machine when writing
// fails.
void copy_as_listed(const std::filesystem::path& source, const std::filesystem::path& target,
                    const std::string& checksum);

}  // namespace relatent
