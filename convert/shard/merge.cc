#include <chrono>
#include <cstring>
#include <map>
#include <set>

#include "convert/shard/manifest.h"
#include "convert/shard/shard.h"
#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/files.h"
#include "formats/mapped_file.h"

namespace relatent {
namespace {

std::string spec_text(DType dtype, const std::vector<std::int64_t>& shape) {
  return std::string(safetensors_name(dtype)) + " " + shape_text(shape);
}

void check_metadata(const SafetensorsFile& file, const std::map<std::string, std::string>& metadata) {
  for (const auto& [key, value] : metadata) {
    std::string expected = key;
    expected.append(" ").append(value).append(" by ").append(kShardsName);
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end() || found->second != value) {
      fail_input({file.path(), "",
                  key == kRankKey ? "is not the file of this rank" : "does not belong to these shards",
                  expected, found == file.metadata().end() ? "nothing" : found->second, ""});
    }
  }
}

// A rank's file, which holds exactly what the manifest says.
SafetensorsFile open_rank(const std::filesystem::path& folder, const ShardManifest& manifest,
                          const std::string& run, Index rank) {
  const std::filesystem::path path = folder / rank_file_name(rank);
  std::error_code error;
  if (!std::filesystem::exists(path, error) && !error) {
    fail_input({folder, "", "the file of a rank is missing", path.filename().string(), "no such file", ""});
  }
  SafetensorsFile file = SafetensorsFile::open(path);
  check_metadata(file, rank_metadata(run, rank, manifest.tp));
  std::set<std::string> expected;
  for (const ShardedTensor& tensor : manifest.tensors) {
    if (!tensor.part(rank)) {
      continue;
    }
    const std::string& name = tensor.spec.name;
    expected.insert(name);
    const std::vector<std::int64_t> shape = shape_of(tensor.slice(rank), tensor.spec.shape);
    const TensorInfo* found = file.find(name);
    if (found == nullptr || found->dtype != tensor.spec.dtype || found->shape != shape) {
      fail_input({path, name, found == nullptr ? "is missing" : "dtype and shape",
                  spec_text(tensor.spec.dtype, shape) + " by " + kShardsName,
                  found == nullptr ? "no such tensor" : spec_text(found->dtype, found->shape), ""});
    }
  }
  for (const TensorInfo& tensor : file.tensors()) {
    if (!expected.contains(tensor.name)) {
      fail_input({path, tensor.name, "is not for this rank", std::string("none by ") + kShardsName,
                  spec_text(tensor.dtype, tensor.shape), ""});
    }
  }
  return file;
}

// A weight file of the checkpoint as its header describes it.
struct Target {
  const WeightFile* file = nullptr;
  std::vector<TensorInfo> tensors;
};

// Headers and the table of tensors are two accounts of the same, which have to agree.
std::vector<Target> read_targets(const ShardManifest& manifest, const std::filesystem::path& path,
                                 const std::map<std::string, const ShardedTensor*>& by_name) {
  std::vector<Target> out;
  std::size_t count = 0;
  for (const WeightFile& file : manifest.weights) {
    const std::uint64_t data_begin = kSafetensorsPrefix + file.header.size();
    if (file.bytes < data_begin) {
      fail_input({path, "", "bytes of " + file.name, "at least " + std::to_string(data_begin),
                  std::to_string(file.bytes), ""});
    }
    Target target{&file, parse_safetensors_header(path, file.header, file.bytes - data_begin).tensors};
    for (const TensorInfo& tensor : target.tensors) {
      const auto listed = by_name.find(tensor.name);
      if (listed == by_name.end() || listed->second->spec.dtype != tensor.dtype ||
          listed->second->spec.shape != tensor.shape) {
        fail_input({path, tensor.name, "the header of " + file.name + " and the list of tensors differ",
                    spec_text(tensor.dtype, tensor.shape),
                    listed == by_name.end()
                        ? "no such tensor"
                        : spec_text(listed->second->spec.dtype, listed->second->spec.shape),
                    ""});
      }
    }
    count += target.tensors.size();
    out.push_back(std::move(target));
  }
  if (count != by_name.size() || count != manifest.tensors.size()) {
    fail_input({path, "", "the list of tensors", "the " + std::to_string(count) + " of the headers",
                std::to_string(manifest.tensors.size()), ""});
  }
  return out;
}

// Rows or columns [begin, end) of a tensor, which the same ranks have from end to end.
struct Segment {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::vector<Index> holders;
};

std::vector<Segment> segments_of(const ShardedTensor& tensor, const std::filesystem::path& manifest_path) {
  const std::int64_t size = tensor.spec.shape[tensor.axis()];
  std::set<std::int64_t> bounds = {0, size};
  for (const std::optional<RankPart>& part : tensor.ranks) {
    if (part) {
      bounds.insert({part->start, part->start + part->count});
    }
  }
  std::vector<Segment> out;
  for (auto bound = bounds.begin(); std::next(bound) != bounds.end(); ++bound) {
    Segment segment{*bound, *std::next(bound), {}};
    for (std::size_t k = 0; k < tensor.ranks.size(); ++k) {
      const std::optional<RankPart>& part = tensor.ranks[k];
      if (part && part->start <= segment.begin && segment.end <= part->start + part->count) {
        segment.holders.push_back(static_cast<Index>(k));
      }
    }
    if (segment.holders.empty()) {
      fail_input({manifest_path, tensor.spec.name, "ranks", "parts that cover the tensor",
                  "none with " + std::string(tensor.axis() == 0 ? "row " : "column ") +
                      std::to_string(segment.begin),
                  ""});
    }
    out.push_back(std::move(segment));
  }
  return out;
}

// Opened shards: everything that headers and the manifest say has been checked.
class Merger {
 public:
  explicit Merger(const std::filesystem::path& shards)
      : folder_(shards), path_(shards / kShardsName), manifest_(ShardManifest::read(path_)) {
    for (const ShardedTensor& tensor : manifest_.tensors) {
      by_name_.emplace(tensor.spec.name, &tensor);
    }
    targets_ = read_targets(manifest_, path_, by_name_);
    // Before room is made for what no rank has.
    for (const ShardedTensor& tensor : manifest_.tensors) {
      static_cast<void>(segments_of(tensor, path_));
    }
    for (Index rank = 0; rank < manifest_.tp; ++rank) {
      ranks_.push_back(open_rank(folder_, manifest_, manifest_.run(), rank));
    }
    for (const CopiedFile& file : manifest_.copied) {
      check_copied(file);
    }
  }

  ShardReport write(const std::filesystem::path& output, const ShardProgress& progress) const {
    PendingFolder folder(output);
    ShardReport report;
    report.run = manifest_.run();
    report.tp = manifest_.tp;
    Index done = 0;
    for (const Target& target : targets_) {
      PendingFile out(folder.staging() / target.file->name, common_permissions(ranks_));
      out.reserve(target.file->bytes);
      write_safetensors_header(out, target.file->header);
      for (const TensorInfo& tensor : target.tensors) {
        write_tensor(*by_name_.at(tensor.name), tensor, out);
        progress(++done, static_cast<Index>(manifest_.tensors.size()));
      }
      out.commit();
      report.files.push_back({target.file->name, target.file->bytes});
    }
    if (manifest_.index) {
      write_text(folder.staging() / kIndexName, *manifest_.index, permissions_of(path_));
    }
    for (const CopiedFile& file : manifest_.copied) {
      copy_as_listed(folder_ / file.name, folder.staging() / file.name, file.checksum);
    }
    const std::string fingerprint = Checkpoint::open(folder.staging()).fingerprint();
    if (fingerprint != manifest_.fingerprint) {
      fail_input({folder_, "", "the weights are not those that were cut",
                  "fingerprint " + manifest_.fingerprint, fingerprint, ""});
    }
    folder.commit();
    return report;
  }

 private:
  void check_copied(const CopiedFile& file) const {
    const std::filesystem::path path = folder_ / file.name;
    const std::string found = checksum_of(path);
    if (found != file.checksum) {
      fail_input(
          {path, "", "was changed after the shards were written", "checksum " + file.checksum, found, ""});
    }
  }

  const SafetensorsFile& rank(Index index) const { return ranks_[static_cast<std::size_t>(index)]; }

  // Where the runs of a segment lie in a rank's file.
  struct Copy {
    const std::byte* first = nullptr;
    std::uint64_t stride = 0;
    const std::byte* run(std::uint64_t i) const { return first + i * stride; }
  };
  Copy copy_in(Index holder, const ShardedTensor& tensor, const Segment& segment) const {
    const TensorInfo& info = *rank(holder).find(tensor.spec.name);
    const SliceRuns runs =
        runs_of({tensor.axis(), segment.begin - tensor.part(holder)->start, segment.end - segment.begin},
                info.dtype, info.shape);
    return {rank(holder).bytes(info).data() + runs.first, runs.stride};
  }

  // The first rank that has a segment gives its bytes; the copies of the others must be the same.
  void write_tensor(const ShardedTensor& tensor, const TensorInfo& place, PendingFile& out) const {
    for (const Segment& segment : segments_of(tensor, path_)) {
      const SliceRuns to =
          runs_of({tensor.axis(), segment.begin, segment.end - segment.begin}, place.dtype, place.shape);
      const Index first = segment.holders.front();
      const Copy source = copy_in(first, tensor, segment);
      for (std::uint64_t i = 0; i < to.count; ++i) {
        out.write_at(place.offset + to.first + i * to.stride, {source.run(i), to.length});
      }
      for (const Index other : std::span(segment.holders).subspan(1)) {
        const Copy copy = copy_in(other, tensor, segment);
        for (std::uint64_t i = 0; i < to.count; ++i) {
          if (std::memcmp(source.run(i), copy.run(i), to.length) != 0) {
            fail_input({rank(other).path(), tensor.spec.name, "copies differ between ranks",
                        "the bytes of " + rank(first).path().filename().string(), "others", ""});
          }
        }
      }
    }
    for (const SafetensorsFile& file : ranks_) {
      if (const TensorInfo* info = file.find(tensor.spec.name); info != nullptr) {
        file.release(*info);
      }
    }
  }

  const std::filesystem::path& folder_;
  std::filesystem::path path_;
  ShardManifest manifest_;
  std::map<std::string, const ShardedTensor*> by_name_;
  std::vector<Target> targets_;
  std::vector<SafetensorsFile> ranks_;
};

}  // namespace

ShardReport merge_shards(const std::filesystem::path& shards, const std::filesystem::path& output,
                         const ShardProgress& progress) {
  const auto start = std::chrono::steady_clock::now();
  ShardReport report = Merger(shards).write(output, progress);
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace relatent
