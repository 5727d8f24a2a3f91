// Writes GGUF files, version 3, little-endian, as a stream. gguf.h says how they lie.
#pragma once

#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

#include "formats/files.h"
#include "formats/gguf.h"
#include "formats/tensor_file.h"

namespace relatent {

// Writes one GGUF file.
class GgufWriter final : public TensorFileWriter {
 public:
  // Data is laid out in the order of specs, whose shapes are row-major. The metadata is written as it is; a
  // general.alignment in it is kept to. Throws std::invalid_argument for what GgufFile::open would refuse,
  // Error (machine) when the disk is full or not writable.
  GgufWriter(const std::filesystem::path& path, const GgufMetadata& metadata, std::vector<TensorSpec> specs);

  // Goes on with the file that an earlier process kept at this path, partial or finished, whose metadata and
  // specs were the same; no tensor counts as written yet. nullptr when there is no such file or its size or
  // header differ.
  static std::unique_ptr<GgufWriter> reopen(const std::filesystem::path& path, const GgufMetadata& metadata,
                                            std::vector<TensorSpec> specs);

  void flush() override;
  void finish() override;

 private:
  GgufWriter(PendingFile file, TensorFileLayout layout)
      : TensorFileWriter(std::move(file), std::move(layout)) {}
};

}  // namespace relatent
