// The tensors of one layer, asked for by what they are.
#pragma once

#include "convert/model/attention.h"
#include "convert/model/placement.h"

namespace relatent {

// All arguments must outlive it. Whatever reads weights widens them to float32, lets the source's pages go
// again and throws Error (input) naming the tensor when a value is not finite.
class LayerReader {
 public:
  // Without a layer_idx the tensors outside the layers.
  LayerReader(const TensorSource& source, const TensorNames& names, const ModelConfig& config,
              std::optional<Index> layer_idx)
      : source_(source), names_(names), config_(config), layer_idx_(layer_idx) {}

  const ModelConfig& config() const { return config_; }
  const AttentionSpec& spec() const { return config_.spec(*layer_idx_); }
  const Rotary& rotary() const { return config_.rotary_of(*layer_idx_); }

  bool has(Role role, std::optional<Index> part = {}) const { return names_.has(role, layer_idx_, part); }
  MatrixF matrix(Role role, std::optional<Index> part = {}) const;
  RowVectorF vector_or_empty(Role role, std::optional<Index> part = {}) const;
  Linear linear(Role weight, Role bias, std::optional<Index> part = {}) const;
  // For products in bfloat16 (linalg/packed.h); what is stored so is packed as it is.
  Linear packed(Role weight, Role bias, std::optional<Index> part = {}) const;
  // With the 1 that a config may add to its weight; without a gain where there is no such norm.
  RmsNorm norm(Role role) const;
  // A norm on latents, with their eps.
  RmsNorm latent_norm(Role role, std::optional<Index> part = {}) const;

  // Complains about a tensor that is there.
  [[noreturn]] void fail(Role role, std::optional<Index> part, const std::string& problem,
                         const std::string& expected, const std::string& found,
                         const std::string& next_step) const;

 private:
  const std::string& name_of(Role role, std::optional<Index> part) const {
    return names_.at(role, layer_idx_, part);
  }

  const TensorSource& source_;
  const TensorNames& names_;
  const ModelConfig& config_;
  std::optional<Index> layer_idx_;
};

}  // namespace relatent
