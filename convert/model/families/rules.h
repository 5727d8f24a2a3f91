// Presences and shapes that the rules of several families name. `part` is the latent or expert that a tensor
// belongs to, where there are several.
#pragma once

#include <string_view>
#include <vector>

#include "convert/model/config.h"
#include "convert/model/families/family.h"
#include "convert/model/tensor_rule.h"

namespace relatent::rules {

using Shape = std::vector<Index>;

Presence required(const ModelConfig& config);
Presence optional(const ModelConfig& config);
Presence required_if(bool condition);
// A tied model may store the head again; the embedding is what counts.
Presence head_presence(const ModelConfig& c);
// Latent attention whose query passes a latent of its own, or does not.
Presence with_q_rank(const ModelConfig& c);
Presence without_q_rank(const ModelConfig& c);
// attention_bias of latent attention.
Presence with_bias(const ModelConfig& c);
Presence with_q_rank_and_bias(const ModelConfig& c);
// attention_bias of grouped-query attention.
Presence with_gqa_bias(const ModelConfig& c);

Shape hidden(const ModelConfig& c, Index part);
Shape vocab_by_hidden(const ModelConfig& c, Index part);
Shape intermediate(const ModelConfig& c, Index part);
Shape intermediate_by_hidden(const ModelConfig& c, Index part);
Shape hidden_by_intermediate(const ModelConfig& c, Index part);

// Latent attention.
Shape mla_q_b_shape(const ModelConfig& c, Index part);  // [H (n + p), query latent or hidden]
Shape mla_q_bias_shape(const ModelConfig& c, Index part);
Shape q_a_shape(const ModelConfig& c, Index part);
Shape q_a_vector_shape(const ModelConfig& c, Index part);
Shape kv_a_shape(const ModelConfig& c, Index part);  // all latents and the rotary key in one tensor
Shape kv_a_bias_shape(const ModelConfig& c, Index part);
Shape kv_a_norm_shape(const ModelConfig& c, Index part);  // of a single latent
Shape mla_o_shape(const ModelConfig& c, Index part);
// A tensor for each branch.
Index branch_count(const ModelConfig& c);
const BranchGeometry& branch_of(const ModelConfig& c, Index part);
Shape branch_norm_shape(const ModelConfig& c, Index part);
Shape branch_up_shape(const ModelConfig& c, Index part);
// What latents and rotary keys read: the layer's input, or normed heads (NormedHeads, attention.h).
Index latent_inputs(const ModelConfig& c);

// Norms of what attention and MLP read, and of what they add.
Presence with_input_norms(const ModelConfig& c);
Presence with_output_norms(const ModelConfig& c);

// Names of a layer's norms that are not those of with_body.
struct NormNames {
  std::string_view mlp_input;
  std::string_view attention_output;
  std::string_view mlp_output;
};
std::vector<TensorRule> with_norm_names(std::vector<TensorRule> rules, const NormNames& names);

std::vector<TensorRule> append(std::vector<TensorRule> rules, const std::vector<TensorRule>& more);
// What surrounds attention, by Llama's names.
std::vector<TensorRule> with_body(std::vector<TensorRule> attention);
// The same rules for layers with that kind of attention.
std::vector<TensorRule> in_layers(WithAttention attention, std::vector<TensorRule> rules);
// Grouped-query attention by Llama's names, without what surrounds it; qkv_bias nullptr: none.
std::vector<TensorRule> grouped_query_attention(Presence (*qkv_bias)(const ModelConfig&));
// A grouped-query model by Llama's names; qkv_bias nullptr: none.
std::vector<TensorRule> grouped_query(Presence (*qkv_bias)(const ModelConfig&));
// The same with the norms on queries and keys that the config's qk_norm asks for.
std::vector<TensorRule> with_qk_norm(std::vector<TensorRule> rules);
// The same where any projection may have a bias.
std::vector<TensorRule> grouped_query_with_biases();
// Queries, keys and values in one tensor, as Phi has them.
FusedTensor fused_queries_keys_and_values();
// Gate and up of an MLP in one tensor, as Phi and GLM have them.
FusedTensor fused_gate_and_up();
// A grouped-query model whose config says whether it has those norms, and biases on queries, keys, values and
// o (attention_bias).
std::vector<TensorRule> grouped_query_by_config();
// What the tensors of experts are called, one for each expert and projection; as DeepSeek has it.
struct ExpertNames {
  std::string_view router = "model.layers.{i}.mlp.gate.weight";
  std::string_view gate = "model.layers.{i}.mlp.experts.{b}.gate_proj.weight";
  std::string_view up = "model.layers.{i}.mlp.experts.{b}.up_proj.weight";
  std::string_view down = "model.layers.{i}.mlp.experts.{b}.down_proj.weight";
  std::string_view shared_gate = "model.layers.{i}.mlp.shared_experts.gate_proj.weight";
  std::string_view shared_up = "model.layers.{i}.mlp.shared_experts.up_proj.weight";
  std::string_view shared_down = "model.layers.{i}.mlp.shared_experts.down_proj.weight";
};
std::vector<TensorRule> with_experts(std::vector<TensorRule> rules, const ExpertNames& names = {});

}  // namespace relatent::rules
