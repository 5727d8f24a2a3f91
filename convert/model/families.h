// The families relatent knows, as data: which tensors a checkpoint holds, their shapes, and what becomes of
// them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "linalg/matrix.h"

namespace relatent {

struct ModelConfig;
class Checkpoint;

// What a tensor is in the model, whatever it is called on disk.
enum class Role {
  embed_tokens,
  final_norm,
  lm_head,
  input_norm,
  post_attention_norm,
  q_weight,
  q_bias,
  k_weight,
  k_bias,
  v_weight,
  v_bias,
  o_weight,
  o_bias,
  q_a_weight,
  q_a_bias,
  q_a_norm,
  kv_a_weight,
  kv_a_bias,
  kv_a_norm,
  kv_b_weight,
  k_rope_weight,
  k_rope_bias,
  kv_b_bias,
  kv_norm_weight,
  kv_shared_weight,
  kv_shared_bias,
  gate_weight,
  gate_bias,
  up_weight,
  up_bias,
  down_weight,
  down_bias,
  // Mixture-of-experts layers; a part is an expert.
  router_weight,
  router_bias,
  expert_gate_weight,
  expert_up_weight,
  expert_down_weight,
  shared_gate_weight,
  shared_up_weight,
  shared_down_weight,
  prediction,  // any tensor of a layer behind the last, which predicts further tokens; never read
  inv_freq,    // a buffer that old checkpoints store; the config says the same
};

// Attention tensors are what a conversion replaces; the others are carried over as they are.
bool is_attention(Role role);

// absent: this config has no such tensor, and one of that name is refused.
enum class Presence { required, optional, absent };

enum class InLayers { all, dense, experts };  // by what kind of MLP the layer has

struct TensorRule {
  Role role;
  // "{i}" stands for the layer index, "{b}" for a part of the layer (a latent, an expert), "{c}" for the same
  // counted from 1
  std::string_view name;
  Presence (*presence)(const ModelConfig&);
  // Sizes in config terms, e.g. {num_attention_heads * head_dim, hidden_size}; of one part where there are
  // parts.
  std::vector<Index> (*shape)(const ModelConfig&, Index part);
  Index (*parts)(const ModelConfig&) = nullptr;  // how many; none where the name has neither
  InLayers layers = InLayers::all;
};

// Two families borrow the model_type of a model that they are not, and are told from it by a key.
inline constexpr std::string_view mlra_type = "gpt2 with mlra_model";
inline constexpr std::string_view gla_type = "llama with qk_rope_dim";

struct Family {
  std::string_view model_type;
  bool latent;  // MLA rather than GQA
  std::vector<TensorRule> rules;
};

const Family* find_family(std::string_view model_type);  // nullptr when unknown
std::string known_model_types();                         // "llama, mistral, ..."

// A tensor of a checkpoint that has been matched to its rule.
struct PlacedTensor {
  std::string name;
  Role role;
  Index layer_idx;  // -1 outside the layers
  Index part = -1;  // which latent or expert; -1 where there are no parts
};

// Matches every tensor of the checkpoint to exactly one rule. Throws Error (input) with one sentence that
// names every tensor without a place, every missing one, or the first one whose shape or dtype is wrong. Of
// layers that predict further tokens only the names are looked at.
std::vector<PlacedTensor> place_tensors(const Checkpoint& checkpoint, const ModelConfig& config);

}  // namespace relatent
