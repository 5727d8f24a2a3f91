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
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "formats/files.h"
#include "formats/mapped_file.h"
#include "formats/tensor_file.h"
#include "linalg/dtype.h"

namespace relatent {

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

// What all of the files allow: for files that are made from them. Throws Error as permissions_of does.
FilePermissions common_permissions(std::span<const SafetensorsFile> files);

// Writes one safetensors file. The header is padded with spaces to eight bytes.
class SafetensorsWriter final : public TensorFileWriter {
 public:
  // Data is laid out in the order of specs. metadata {"format": "pt"} is always written, as loaders demand,
  // and `metadata` behind it. Throws std::invalid_argument on duplicate names, Error (machine) when the disk
  // is full or not writable.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorSpec> specs,
                    const std::map<std::string, std::string>& metadata = {},
                    FilePermissions permissions = {});

  // Goes on with the file that an earlier process kept at this path, partial or finished, whose specs were
  // the same; no tensor counts as written yet. nullptr when there is no such file or its size or header
  // differ.
  static std::unique_ptr<SafetensorsWriter> reopen(const std::filesystem::path& path,
                                                   std::vector<TensorSpec> specs,
                                                   FilePermissions permissions = {});

  // Copies a slice of a tensor of another file without decoding it; dtype and shape must be the slice's. Lets
  // the source's pages go.
  void copy_slice(const std::string& name, const SafetensorsFile& source, const TensorInfo& tensor,
                  const TensorSlice& slice);

 private:
  SafetensorsWriter(PendingFile file, TensorFileLayout layout)
      : TensorFileWriter(std::move(file), std::move(layout)) {}
};

}  // namespace relatent
