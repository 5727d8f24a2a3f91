// Every tensor of a checkpoint matched to its rule.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "convert/model/config.h"
#include "convert/model/tensor_rule.h"
#include "formats/checkpoint.h"
#include "formats/tensor_source.h"

namespace relatent {

// A tensor with its place in the model.
struct PlacedTensor {
  std::string name;
  Role role;
  std::optional<Index> layer_idx;  // none outside the layers
  std::optional<Index> part{};     // which latent or expert, of roles that have several
};

// A tensor that a config asks for.
struct ExpectedTensor : PlacedTensor {
  Presence presence;  // not absent
  std::vector<std::int64_t> shape;
};

// Every tensor that a model of this config has or may have, rule by rule.
std::vector<ExpectedTensor> expected_tensors(const ModelConfig& config);

// The same with one tensor, whose role says nothing, in the place of those whose rows it holds
// (Family::fused).
std::vector<ExpectedTensor> stored_tensors(const ModelConfig& config);

// Cuts tensors that hold the rows of several (Family::fused) into those. Throws Error (input) naming the
// first that is missing or has other rows than the config says.
void cut_fused_tensors(const ModelConfig& config, Checkpoint& checkpoint);

// Matches every tensor of the source to exactly one rule. Throws Error (input) with one sentence that names
// every tensor without a place, every missing one, or the first one whose shape or dtype is wrong. Of layers
// that predict further tokens only the names are looked at.
std::vector<PlacedTensor> place_tensors(const TensorSource& source, const ModelConfig& config);

// The names of a checkpoint's tensors by what they are.
class TensorNames {
 public:
  explicit TensorNames(const std::vector<PlacedTensor>& tensors) {
    for (const PlacedTensor& tensor : tensors) {
      names_[{tensor.role, tensor.layer_idx, tensor.part}] = tensor.name;
    }
  }
  bool has(Role role, std::optional<Index> layer_idx, std::optional<Index> part = {}) const {
    return names_.contains({role, layer_idx, part});
  }
  // std::out_of_range when there is none.
  const std::string& at(Role role, std::optional<Index> layer_idx, std::optional<Index> part = {}) const {
    return names_.at({role, layer_idx, part});
  }

 private:
  std::map<std::tuple<Role, std::optional<Index>, std::optional<Index>>, std::string> names_;
};

}  // namespace relatent
