// Tensors in a file, and what writing one file of them takes, whatever its format.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "formats/files.h"
#include "formats/tensor_sink.h"
#include "linalg/dtype.h"

namespace relatent {

class SafetensorsFile;

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

// Bytes of a dense array or tensor, or nothing when the shape is negative or the product does not fit.
std::optional<std::uint64_t> dense_bytes(std::uint64_t item_bytes, const std::vector<std::int64_t>& shape);
std::optional<std::uint64_t> dense_bytes(DType dtype, const std::vector<std::int64_t>& shape);

// A tensor to be written.
struct TensorSpec {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  std::uint64_t bytes() const;
};

// A file before its first byte: the header, and where every tensor lies.
struct TensorFileLayout {
  struct Place {
    TensorSpec spec;
    std::uint64_t offset = 0;  // from the start of the file
  };
  std::string header;  // all bytes before the data
  std::vector<Place> tensors;
  std::uint64_t bytes = 0;  // of the file
  FilePermissions permissions = {};
};

// Writes one file whose header and tensors are all known beforehand; the header goes first, tensors may
// arrive in any order. The file appears under its name only by finish().
class TensorFileWriter : public TensorSink {
 public:
  void mark_written(const std::string& name) override { claim(name).written = true; }
  std::string checksum(const std::string& name) const override { return slot(name).checksum; }
  std::string stored_checksum(const std::string& name) const override;
  void flush() override;
  // Bytes in the stored dtype; size must be the tensor's (std::invalid_argument otherwise).
  void write(const std::string& name, std::span<const std::byte> bytes);
  void write_floats(const std::string& name, std::span<const float> values) override;
  // Copies a tensor of another file without decoding it; dtype and shape must agree.
  void copy(const std::string& name, const SafetensorsFile& source, const TensorInfo& tensor);
  void copy(const std::string& name, const Checkpoint& source, const std::string& source_name) override;
  // Throws std::logic_error naming the first tensor that was never written; else flushes and renames into
  // place.
  void finish() override;
  std::uint64_t file_bytes() const { return file_bytes_; }
  std::uint64_t bytes_written() const override { return file_bytes_; }

 protected:
  struct Slot {
    TensorSpec spec;
    std::uint64_t offset = 0;
    bool written = false;
    std::string checksum;  // of what write_floats wrote
  };
  // A new file. Throws Error (machine).
  TensorFileWriter(const std::filesystem::path& path, TensorFileLayout layout);
  // Goes on with what take_up returned for the layout.
  TensorFileWriter(PendingFile file, TensorFileLayout layout);
  // What an earlier process kept at this path, partial or finished; nothing when there is no such file or its
  // size or header are others.
  static std::optional<PendingFile> take_up(const std::filesystem::path& path,
                                            const TensorFileLayout& layout);

  // std::invalid_argument for a tensor that was not announced; claim also for one that is written already or
  // of another kind.
  const Slot& slot(const std::string& name) const;
  Slot& claim(const std::string& name);
  Slot& claim(const std::string& name, DType dtype, const std::vector<std::int64_t>& shape);
  PendingFile& file() { return file_; }
  void wrote(Slot& slot) {
    slot.written = true;
    dirty_ = true;
  }

 private:
  PendingFile file_;
  std::vector<Slot> slots_;
  std::unordered_map<std::string, std::size_t> index_;
  std::uint64_t file_bytes_ = 0;
  std::atomic<bool> dirty_ = false;  // written to since the last flush
};

}  // namespace relatent
