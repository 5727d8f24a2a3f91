// One safetensors file: validated whole before any tensor is touched, read by mapping, written as a stream.
//
// Layout: u64 little-endian header length, JSON header, data. https://github.com/huggingface/safetensors
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
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

// The part [start, start + count) of one axis of a tensor, whole along the others: rows (axis 0) or columns
// (axis 1).
struct TensorSlice {
  std::size_t axis = 0;
  std::int64_t start = 0;
  std::int64_t count = 0;
};

// The slice's own shape: count in the place of the axis. Throws std::invalid_argument for a slice that does
// not lie within the shape.
std::vector<std::int64_t> shape_of(const TensorSlice& slice, std::vector<std::int64_t> shape);

// Where the bytes of a slice lie within a row-major tensor: run i of `count` covers [first + i * stride,
// first
// + i * stride + length).
struct SliceRuns {
  std::uint64_t count = 0;
  std::uint64_t first = 0;
  std::uint64_t stride = 0;
  std::uint64_t length = 0;
};
// Throws std::invalid_argument as shape_of does.
SliceRuns runs_of(const TensorSlice& slice, DType dtype, const std::vector<std::int64_t>& shape);

// What a header says.
struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in the order of their data
  std::map<std::string, std::string> metadata;
};

// Checks and reads the JSON text of a header that data_bytes of data follow, as SafetensorsFile::open does.
// `file` is where complaints say it stands.
SafetensorsHeader parse_safetensors_header(const std::filesystem::path& file, std::string_view text,
                                           std::uint64_t data_bytes);

// Bytes before the header's text, which tell its length.
inline constexpr std::uint64_t kSafetensorsPrefix = 8;

// Writes the length and the text of a header to the beginning of a file.
void write_safetensors_header(PendingFile& file, std::string_view text);

class SafetensorsFile {
 public:
  // Maps the file and checks everything its header claims: length prefix within the file and at most 100 000
  // 000, valid UTF-8 JSON without duplicate names, known dtypes, non-negative shapes whose byte count does
  // not overflow and equals the byte range, ranges that are contiguous from 0 without hole or overlap and end
  // at the end of the file, metadata of strings only. Throws Error (input) naming file, tensor, expected and
  // found.
  static SafetensorsFile open(const std::filesystem::path& path);

  // In the order of their data.
  const std::vector<TensorInfo>& tensors() const { return header_.tensors; }
  const TensorInfo* find(const std::string& name) const;  // nullptr when absent
  std::span<const std::byte> bytes(const TensorInfo& tensor) const;
  // Lets the kernel drop the pages of a tensor that is done with.
  void release(const TensorInfo& tensor) const { file_.release(tensor.offset, tensor.bytes); }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  // The header as it is spelled, with the padding behind it.
  std::string_view header_text() const;
  std::uint64_t file_bytes() const { return file_.bytes().size(); }
  const std::filesystem::path& path() const { return file_.path(); }

 private:
  MappedFile file_;
  SafetensorsHeader header_;
  std::unordered_map<std::string, std::size_t> index_;
};

// A tensor to be written.
struct TensorSpec {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  std::uint64_t bytes() const;
};

// Writes one safetensors file whose tensors are all known beforehand; the header goes first (padded with
// spaces to eight bytes), tensors may arrive in any order, different ones from several threads at once. The
// file appears under its name only by finish().
class SafetensorsWriter {
 public:
  // Data is laid out in the order of specs. metadata {"format": "pt"} is always written, as loaders demand,
  // and `metadata` behind it. Throws std::invalid_argument on duplicate names, Error (machine) when the disk
  // is full or not writable.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorSpec> specs,
                    const std::map<std::string, std::string>& metadata = {});

  // Goes on with the file that an earlier process kept at this path, partial or finished, whose specs were
  // the same; no tensor counts as written yet. nullptr when there is no such file or its size or header
  // differ.
  static std::unique_ptr<SafetensorsWriter> reopen(const std::filesystem::path& path,
                                                   std::vector<TensorSpec> specs);

  // Counts a tensor of a reopened file as written (std::invalid_argument when there is none of that name).
  void mark_written(const std::string& name) { claim(name).written = true; }
  // What was written so far is on the disk when this returns, and outlives this object.
  void flush();
  // Bytes in the stored dtype; size must be the tensor's (std::invalid_argument otherwise; also when written
  // twice).
  void write(const std::string& name, std::span<const std::byte> bytes);
  // Copies a tensor of another file without decoding it; dtype and shape must agree.
  void copy(const std::string& name, const SafetensorsFile& source, const TensorInfo& tensor);
  // Likewise a slice of it; dtype and shape must be the slice's. Lets the source's pages go.
  void copy_slice(const std::string& name, const SafetensorsFile& source, const TensorInfo& tensor,
                  const TensorSlice& slice);
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
  SafetensorsWriter(PendingFile file, std::vector<TensorSpec> specs,
                    const std::map<std::string, std::string>& metadata);
  Slot& claim(const std::string& name);
  Slot& claim(const std::string& name, DType dtype, const std::vector<std::int64_t>& shape);

  PendingFile file_;
  std::vector<Slot> slots_;
  std::unordered_map<std::string, std::size_t> index_;
  std::uint64_t file_bytes_ = 0;
  std::string header_;
  std::atomic<bool> dirty_ = false;  // written to since the last flush
};

}  // namespace relatent
