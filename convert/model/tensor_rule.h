// What the tensors of a layout are called and how large they are, as data: the same rules say what a
// checkpoint must hold and what is written.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "linalg/matrix.h"

namespace relatent {

struct ModelConfig;

// What a tensor is in the model, whatever it is called on disk.
enum class Role {
  embed_tokens,
  final_norm,
  lm_head,
  input_norm,
  post_attention_norm,    // of what the MLP reads
  attention_output_norm,  // of what attention adds to the stream
  mlp_output_norm,
  q_weight,
  q_bias,
  k_weight,
  k_bias,
  v_weight,
  v_bias,
  o_weight,
  o_bias,
  q_head_norm,  // of queries and keys, before they are rotated
  k_head_norm,
  // Of a latent layer that reads normed heads (attention.h): the source's own projections.
  normed_q_weight,
  normed_q_bias,
  normed_k_weight,
  normed_k_bias,
  normed_v_weight,
  normed_v_bias,
  q_a_weight,
  q_a_bias,
  q_a_norm,
  kv_a_weight,
  kv_a_bias,
  kv_a_norm,
  kv_b_weight,
  k_b_weight,  // the two halves of kv_b_weight, where a layout keeps them apart
  v_b_weight,
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
  shared_expert_gate,  // by whose sigmoid the shared experts are multiplied
  prediction,          // any tensor of a layer behind the last, which predicts further tokens; never read
  inv_freq,            // a buffer that old checkpoints store; the config says the same
};

// Attention tensors are what a conversion replaces; the others are copied as they are.
bool is_attention(Role role);

// What of the source a tensor of a converted model is, unchanged; none for what is computed.
std::optional<Role> source_role(Role role);

// absent: this config has no such tensor, and one of that name is refused.
enum class Presence { required, optional, absent };

enum class InLayers { all, dense, experts };              // by what kind of MLP the layer has
enum class WithAttention { any, latent, grouped_query };  // by what kind of attention

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
  // Behind the rule before it part by part, rather than for all parts at once.
  bool beside_previous = false;
  WithAttention attention = WithAttention::any;
};

}  // namespace relatent
