// Presences and shapes that the rules of several families name. `part` is the latent or expert that a tensor
// belongs to, where there are several.
#pragma once

#include <vector>

#include "convert/model/config.h"
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

std::vector<TensorRule> append(std::vector<TensorRule> rules, const std::vector<TensorRule>& more);
// What surrounds attention, by Llama's names.
std::vector<TensorRule> with_body(std::vector<TensorRule> attention);
// A grouped-query model by Llama's names; qkv_bias nullptr: none.
std::vector<TensorRule> grouped_query(Presence (*qkv_bias)(const ModelConfig&));
// The same with the norms on queries and keys that the config's qk_norm asks for.
std::vector<TensorRule> with_qk_norm(std::vector<TensorRule> rules);
// Experts as DeepSeek names them, one tensor for each.
std::vector<TensorRule> with_experts(std::vector<TensorRule> rules);

}  // namespace relatent::rules
