// Where the tensors of a model lie: a checkpoint folder (checkpoint.h) or a single file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "linalg/dtype.h"
#include "linalg/matrix.h"

namespace relatent {

struct TensorInfo;

class TensorSource {
 public:
  TensorSource() = default;
  TensorSource(const TensorSource&) = delete;
  TensorSource& operator=(const TensorSource&) = delete;
  TensorSource(TensorSource&&) = default;
  TensorSource& operator=(TensorSource&&) = default;
  virtual ~TensorSource() = default;

  // The folder or file as it was opened.
  virtual const std::filesystem::path& path() const = 0;
  // Where config() stands.
  virtual std::filesystem::path config_path() const = 0;
  // What is said of the model beside its tensors.
  virtual const nlohmann::ordered_json& config() const = 0;

  // All tensor names, sorted.
  virtual std::vector<std::string> tensor_names() const = 0;
  virtual bool contains(const std::string& name) const = 0;
  // These throw Error (input) naming the source and the tensor when there is none of that name.
  virtual const TensorInfo& info(const std::string& name) const = 0;
  virtual const std::filesystem::path& path_of(const std::string& name) const = 0;  // of its file
  virtual std::span<const std::byte> bytes(const std::string& name) const = 0;
  // Lets the kernel drop the pages of a tensor that is done with.
  virtual void release(const std::string& name) const = 0;

  // A floating tensor of one to three dimensions, widened to float32: one gives a single row, of three the
  // first two are its rows. Throws Error (input) when it is not floating or has another number of dimensions.
  MatrixF read_matrix(const std::string& name) const;
  // Throws Error (input) naming the tensor when it holds NaN or infinity.
  void require_finite(const std::string& name) const;
  // Sum of all tensors' bytes.
  std::uint64_t tensor_bytes() const;
  // XXH3-128 in hexadecimal over every tensor's name, dtype, shape and bytes in name order, followed by the
  // config serialised with sorted keys: the same weights give the same fingerprint however they are cut into
  // shards. Reads everything once.
  std::string fingerprint() const;
};

}  // namespace relatent
