#include "formats/tensor_file.h"

#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "formats/checkpoint.h"
#include "formats/hash.h"
#include "formats/mapped_file.h"
#include "formats/narrowing.h"
#include "linalg/stages.h"

namespace relatent {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

std::vector<std::int64_t> shape_of(const TensorSlice& slice, std::vector<std::int64_t> shape) {
  if (slice.axis >= shape.size() || slice.start < 0 || slice.count < 0 ||
      slice.count > shape[slice.axis] - slice.start) {
    throw std::invalid_argument(std::to_string(slice.count) + " from " + std::to_string(slice.start) +
                                " of axis " + std::to_string(slice.axis) + " is no part of the shape " +
                                shape_text(shape));
  }
  shape[slice.axis] = slice.count;
  return shape;
}

SliceRuns runs_of(const TensorSlice& slice, DType dtype, const std::vector<std::int64_t>& shape) {
  shape_of(slice, shape);
  SliceRuns out;
  out.count = 1;
  std::uint64_t unit = size_of(dtype);
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const auto dimension = static_cast<std::uint64_t>(shape[i]);
    out.count *= i < slice.axis ? dimension : 1;
    unit *= i > slice.axis ? dimension : 1;
  }
  out.first = static_cast<std::uint64_t>(slice.start) * unit;
  out.stride = static_cast<std::uint64_t>(shape[slice.axis]) * unit;
  out.length = static_cast<std::uint64_t>(slice.count) * unit;
  return out;
}

std::optional<std::uint64_t> dense_bytes(std::uint64_t item_bytes, const std::vector<std::int64_t>& shape) {
  std::uint64_t product = 1;
  for (const std::int64_t dimension : shape) {
    if (dimension < 0 || __builtin_mul_overflow(product, static_cast<std::uint64_t>(dimension), &product)) {
      return std::nullopt;
    }
  }
  if (__builtin_mul_overflow(product, item_bytes, &product)) {
    return std::nullopt;
  }
  return product;
}

std::optional<std::uint64_t> dense_bytes(DType dtype, const std::vector<std::int64_t>& shape) {
  return dense_bytes(size_of(dtype), shape);
}

std::uint64_t TensorSpec::bytes() const {
  const std::optional<std::uint64_t> count = dense_bytes(dtype, shape);
  if (!count) {
    throw std::invalid_argument("tensor " + name + ": no byte count fits the shape " + shape_text(shape));
  }
  return *count;
}

TensorFileWriter::TensorFileWriter(PendingFile file, TensorFileLayout layout)
    : file_(std::move(file)), file_bytes_(layout.bytes) {
  slots_.reserve(layout.tensors.size());
  for (TensorFileLayout::Place& tensor : layout.tensors) {
    index_.emplace(tensor.spec.name, slots_.size());
    slots_.push_back({std::move(tensor.spec), tensor.offset, false, ""});
  }
}

TensorFileWriter::TensorFileWriter(const std::filesystem::path& path, TensorFileLayout layout)
    : TensorFileWriter(PendingFile(path, layout.permissions), layout) {
  // What nobody writes to, padding, is zero from here on.
  file_.reserve(file_bytes_);
  file_.write_at(0, std::as_bytes(std::span<const char>(layout.header)));
  dirty_ = true;
}

std::optional<PendingFile> TensorFileWriter::take_up(const std::filesystem::path& path,
                                                     const TensorFileLayout& layout) {
  std::filesystem::path partial = path;
  partial += ".partial";
  std::error_code missing;
  if (!std::filesystem::exists(partial, missing)) {
    std::filesystem::rename(path, partial, missing);
  }
  if (!std::filesystem::is_regular_file(partial, missing)) {
    return std::nullopt;
  }
  std::optional<PendingFile> out = PendingFile::reopen(path, layout.permissions);
  out->keep();
  const MappedFile found = MappedFile::open(partial);
  if (found.bytes().size() != layout.bytes ||
      std::memcmp(found.bytes().data(), layout.header.data(), layout.header.size()) != 0) {
    return std::nullopt;
  }
  return out;
}

void TensorFileWriter::flush() {
  file_.keep();
  // Before flushing: what another thread writes in the meantime waits for the next time.
  if (dirty_.exchange(false)) {
    file_.flush();
  }
}

const TensorFileWriter::Slot& TensorFileWriter::slot(const std::string& name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) {
    throw std::invalid_argument("tensor " + name + " was not announced to " + file_.path().string());
  }
  return slots_[found->second];
}

TensorFileWriter::Slot& TensorFileWriter::claim(const std::string& name) {
  if (slot(name).written) {
    throw std::invalid_argument("tensor " + name + " is written twice to " + file_.path().string());
  }
  return slots_[index_.at(name)];
}

TensorFileWriter::Slot& TensorFileWriter::claim(const std::string& name, DType dtype,
                                                const std::vector<std::int64_t>& shape) {
  Slot& slot = claim(name);
  if (slot.spec.dtype != dtype || slot.spec.shape != shape) {
    throw std::invalid_argument("tensor " + name + ": expected " +
                                std::string(safetensors_name(slot.spec.dtype)) + " " +
                                shape_text(slot.spec.shape) + ", got " +
                                std::string(safetensors_name(dtype)) + " " + shape_text(shape));
  }
  return slot;
}

void TensorFileWriter::write(const std::string& name, std::span<const std::byte> bytes) {
  Slot& slot = claim(name);
  if (bytes.size() != slot.spec.bytes()) {
    throw std::invalid_argument("tensor " + name + ": expected " + std::to_string(slot.spec.bytes()) +
                                " bytes, got " + std::to_string(bytes.size()));
  }
  file_.write_at(slot.offset, bytes);
  wrote(slot);
}

void TensorFileWriter::write_floats(const std::string& name, std::span<const float> values) {
  const Stage stage("write");
  std::vector<std::byte> storage;
  Slot& slot = claim(name);
  const std::span<const std::byte> bytes =
      narrow_floats(file_.path(), name, slot.spec.dtype, values, storage);
  write(name, bytes);
  slot.checksum = checksum_of(bytes);
}

std::string TensorFileWriter::stored_checksum(const std::string& name) const {
  const Slot& wanted = slot(name);
  const MappedFile file = MappedFile::open(file_.partial_path());
  const std::uint64_t bytes = wanted.spec.bytes();
  if (wanted.offset > file.bytes().size() || bytes > file.bytes().size() - wanted.offset) {
    return "";
  }
  return checksum_of(file.bytes().subspan(wanted.offset, bytes));
}

void TensorFileWriter::copy(const std::string& name, const SafetensorsFile& source,
                            const TensorInfo& tensor) {
  Slot& slot = claim(name, tensor.dtype, tensor.shape);
  file_.copy_at(slot.offset, source.path(), tensor.offset, tensor.bytes);
  wrote(slot);
}

void TensorFileWriter::copy(const std::string& name, const Checkpoint& source,
                            const std::string& source_name) {
  const Stage stage("copy");
  copy(name, source.file_of(source_name), source.info(source_name));
}

void TensorFileWriter::finish() {
  for (const Slot& slot : slots_) {
    if (!slot.written) {
      throw std::logic_error("tensor " + slot.spec.name + " was never written to " + file_.path().string());
    }
  }
  file_.commit();
}

}  // namespace relatent
