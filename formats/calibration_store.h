// What one calibration pass leaves behind, in HDF5: readable with h5py and h5dump without this program.
//
//   /           attributes: format "relatent-calibration", format_version 3 (4 where it has normalised
//   heads),
//               creator (program and version),
//               source_fingerprint, source_config (the JSON text), model_type, hidden_size,
//               num_hidden_layers, num_attention_heads, compute (what projections were multiplied in:
//               "float32" or "bfloat16")
//   /tokens     int32 [sequences, length]; attributes: dimensions ["sequence", "position"], unit "token id"
//   /layers/00000
//               attribute: tokens (how many the means are over)
//   /layers/00000/second_moment
//               float64 [hidden, hidden], E[x xᵀ] of the normed attention input x; attributes: dimensions
//               ["hidden", "hidden"], unit "square of the normed input"
//   /layers/00000/mean
//               float64 [hidden], E[x]; dimensions ["hidden"], unit "normed input"
//   /layers/00000/distance_mass
//               float64 [heads, length]: mean attention mass that a query of the head puts on keys Δ
//               positions back; each row sums to 1; dimensions ["head", "distance"], unit "probability"
//
// of a model with norms on queries and keys, in every layer also, with f = [k̂; v] of all key/value heads (the
// root attributes num_key_value_heads, head_dim) and q̂ of all heads, k̂ and q̂ normalised and not yet rotated:
//   /layers/00000/feature_moment
//               float64 [feature, feature], E[f fᵀ]
//   /layers/00000/feature_mean
//               float64 [feature], E[f]
//   /layers/00000/query_moment
//               float64 [heads * head_dim, head_dim]: of every head E[q̂_h q̂_hᵀ]
//   /layers/00000/query_mean
//               float64 [heads * head_dim], E[q̂]
//   /layers/00000/normed_cross
//               float64 [(heads + key/value heads) * head_dim, hidden]: E[q̂ xᵀ], then E[k̂ xᵀ]
//
// Text attributes are fixed-length UTF-8 (bytes in h5py, lists as arrays of them), numbers int64; all
// metadata carries the checksums of the HDF5 1.8 format. Datasets are contiguous and little-endian; their
// attribute checksum is the XXH3-128 of their bytes, in hexadecimal. Version 1 had none, and is still read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "formats/npy.h"
#include "linalg/matrix.h"

namespace relatent {

// Of normalised queries q̂ and keys k̂, not rotated yet, and f = [k̂; v].
struct NormedHeadMoments {
  MatrixD feature_moment;  // [2 K d, 2 K d], E[f fᵀ]
  VectorD feature_mean;    // [2 K d], E[f]
  MatrixD query_moment;    // [H d, d], E[q̂_h q̂_hᵀ] head by head
  VectorD query_mean;      // [H d], E[q̂]
  MatrixD cross;           // [(H + K) d, hidden], E[q̂ xᵀ], then E[k̂ xᵀ]
};

struct LayerMoments {
  std::int64_t tokens = 0;
  MatrixD second_moment;  // [hidden, hidden]
  VectorD mean;           // [hidden]
  MatrixD distance_mass;  // [heads, length]
  std::optional<NormedHeadMoments> normed_heads{};
};

struct CalibrationHeader {
  std::string source_fingerprint;
  std::string source_config;  // JSON text
  std::string model_type;
  std::int64_t hidden_size = 0;
  std::int64_t num_hidden_layers = 0;
  std::int64_t num_attention_heads = 0;
  // Of a model with norms on queries and keys; else 0.
  std::int64_t num_key_value_heads = 0;
  std::int64_t head_dim = 0;
  std::string compute = "float32";
};

// Writes a store layer by layer; the file appears under its name only by finish(). Bytes are a function of
// the contents alone (no time stamps). Throws Error (machine) when writing fails.
class CalibrationWriter {
 public:
  CalibrationWriter(const std::filesystem::path& path, const CalibrationHeader& header,
                    const Sequences& sequences);
  CalibrationWriter(const CalibrationWriter&) = delete;
  CalibrationWriter& operator=(const CalibrationWriter&) = delete;
  ~CalibrationWriter();
  // Layers in order from 0; shapes must fit the header (std::invalid_argument).
  void add_layer(const LayerMoments& moments);
  // Throws std::logic_error when layers are missing.
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Reads a store. Layers are read when asked for.
class CalibrationFile {
 public:
  // Throws Error (input): not HDF5, or of a version before 1.8 without checksums of the metadata, another
  // format or a newer version, attributes or datasets missing or of another shape than the header says
  // (naming the dataset, expected and found). sequences and layer: values that are damaged or cannot be what
  // they are to be.
  static CalibrationFile open(const std::filesystem::path& path);
  CalibrationFile(CalibrationFile&&) noexcept;
  CalibrationFile& operator=(CalibrationFile&&) noexcept;
  ~CalibrationFile();

  const CalibrationHeader& header() const;
  const std::filesystem::path& path() const;
  Sequences sequences() const;
  LayerMoments layer(std::int64_t layer_idx) const;

 private:
  struct Impl;
  explicit CalibrationFile(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace relatent
