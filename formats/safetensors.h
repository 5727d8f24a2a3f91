// One safetensors file: validated whole before any tensor is touched, read by mapping, written as a stream.
//
// Layout: u64 little-endian header length, JSON header, data. https://github.com/huggingface/safetensors
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "formats/files.h"
#include "linalg/dtype.h"

namespace relatent {

// What a header says of one tensor.
struct TensorInfo {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;  // row-major; empty for a scalar
  std::uint64_t offset = 0;         // of its first byte, counted from the start of the file
  std::uint64_t bytes = 0;          // elements * size_of(dtype)
};

// "[512, 64]"
std::string shape_text(const std::vector<std::int64_t>& shape);

class SafetensorsFile {
 public:
  // Maps the file and checks everything its header claims: length prefix within the file and at most 100 000
  // 000, valid UTF-8 JSON without duplicate names, known dtypes, non-negative shapes whose byte count does
  // not overflow and equals the byte range, ranges that are contiguous from 0 without hole or overlap and end
  // at the end of the file, metadata of strings only. Throws Error (input) naming file, tensor, expected and
  // found.
  static SafetensorsFile open(const std::filesystem::path& path);

  // In the order of their data.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const TensorInfo* find(const std::string& name) const;  // nullptr when absent
  std::span<const std::byte> bytes(const TensorInfo& tensor) const;
  // Lets the kernel drop the pages of a tensor that is done with.
  void release(const TensorInfo& tensor) const { file_.release(tensor.offset, tensor.bytes); }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::filesystem::path& path() const { return file_.path(); }

 private:
  MappedFile file_;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, std::size_t> index_;
  std::map<std::string, std::string> metadata_;
};

// A tensor to be written.
struct TensorSpec {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  std::uint64_t bytes() const;
};

// Writes one safetensors file whose tensors are all known beforehand; the header goes first (padded with
// spaces to eight bytes), tensors may arrive in any order. The file appears under its name only by finish().
class SafetensorsWriter {
 public:
  // Data is laid out in the order of specs. metadata {"format": "pt"} is always written, as loaders demand.
  // Throws std::invalid_argument on duplicate names, Error (machine) when the disk is full or not writable.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorSpec> specs);

  // Bytes in the stored dtype; size must be the tensor's (std::invalid_argument otherwise; also when written
  // twice).
  void write(const std::string& name, std::span<const std::byte> bytes);
  // Copies a tensor of another file without decoding it; dtype and shape must agree.
  void copy(const std::string& name, const SafetensorsFile& source, const TensorInfo& tensor);
  // Throws std::logic_error naming the first tensor that was never written; else flushes and renames into
  // place.
  void finish();
  std::uint64_t file_bytes() const { return file_bytes_; }

 private:
  struct Slot {
    TensorSpec spec;
    std::uint64_t offset = 0;
    bool written = false;
  };
  Slot& claim(const std::string& name);

  PendingFile file_;
  std::vector<Slot> slots_;
  std::unordered_map<std::string, std::size_t> index_;
  std::uint64_t file_bytes_ = 0;
};

}  // namespace relatent
