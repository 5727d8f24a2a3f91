#include "convert/model/families/rules.h"

namespace relatent::rules {
namespace {

Index q_rows(const ModelConfig& c) {
  return c.num_attention_heads * c.gqa->head_dim;
}

Index kv_rows(const ModelConfig& c) {
  return c.gqa->num_key_value_heads * c.gqa->head_dim;
}

Shape q_shape(const ModelConfig& c, Index /*part*/) {
  return {q_rows(c), c.hidden_size};
}

Shape kv_shape(const ModelConfig& c, Index /*part*/) {
  return {kv_rows(c), c.hidden_size};
}

Shape o_shape(const ModelConfig& c, Index /*part*/) {
  return {c.hidden_size, q_rows(c)};
}

Shape q_bias_shape(const ModelConfig& c, Index /*part*/) {
  return {q_rows(c)};
}

Shape kv_bias_shape(const ModelConfig& c, Index /*part*/) {
  return {kv_rows(c)};
}

Shape q_head_norm_shape(const ModelConfig& c, Index /*part*/) {
  return {qk_norm_size(c.gqa->qk_norm, c.num_attention_heads, c.gqa->head_dim)};
}

Shape k_head_norm_shape(const ModelConfig& c, Index /*part*/) {
  return {qk_norm_size(c.gqa->qk_norm, c.gqa->num_key_value_heads, c.gqa->head_dim)};
}

Presence with_head_norms(const ModelConfig& c) {
  return required_if(normalises_keys(c));
}

Shape inv_freq_shape(const ModelConfig& c, Index /*part*/) {
  return {c.gqa->rotary_dim / 2};
}

Index mla_q_rows(const ModelConfig& c) {
  return c.num_attention_heads * (c.latent->qk_nope_head_dim + c.latent->qk_rope_head_dim);
}

Presence with_router_bias(const ModelConfig& c) {
  return required_if(c.experts && c.experts->topk_method == TopkMethod::noaux_tc);
}

Presence with_shared_experts(const ModelConfig& c) {
  return required_if(c.experts && c.experts->shared_size > 0);
}

Presence with_shared_gate(const ModelConfig& c) {
  return required_if(c.experts && c.experts->shared_gate);
}

Index expert_count(const ModelConfig& c) {
  return c.experts ? c.experts->count : 0;
}

Shape router_shape(const ModelConfig& c, Index /*part*/) {
  return {c.experts->count, c.hidden_size};
}

Shape router_bias_shape(const ModelConfig& c, Index /*part*/) {
  return {c.experts->count};
}

Shape expert_by_hidden(const ModelConfig& c, Index /*part*/) {
  return {c.experts->intermediate_size, c.hidden_size};
}

Shape hidden_by_expert(const ModelConfig& c, Index /*part*/) {
  return {c.hidden_size, c.experts->intermediate_size};
}

Shape shared_by_hidden(const ModelConfig& c, Index /*part*/) {
  return {c.experts->shared_size, c.hidden_size};
}

Shape hidden_by_shared(const ModelConfig& c, Index /*part*/) {
  return {c.hidden_size, c.experts->shared_size};
}

Shape one_by_hidden(const ModelConfig& c, Index /*part*/) {
  return {1, c.hidden_size};
}

}  // namespace

const BranchGeometry& branch_of(const ModelConfig& c, Index part) {
  return c.latent->branches[static_cast<std::size_t>(part)];
}
Presence required(const ModelConfig& /*config*/) {
  return Presence::required;
}

Presence optional(const ModelConfig& /*config*/) {
  return Presence::optional;
}

Presence required_if(bool condition) {
  return condition ? Presence::required : Presence::absent;
}

Presence head_presence(const ModelConfig& c) {
  return c.tie_word_embeddings ? Presence::optional : Presence::required;
}

Presence with_q_rank(const ModelConfig& c) {
  return required_if(c.latent->q_lora_rank.has_value());
}

Presence without_q_rank(const ModelConfig& c) {
  return required_if(!c.latent->q_lora_rank.has_value());
}

Presence with_bias(const ModelConfig& c) {
  return required_if(c.latent->attention_bias);
}

Presence with_gqa_bias(const ModelConfig& c) {
  return required_if(c.gqa->attention_bias);
}

Presence with_q_rank_and_bias(const ModelConfig& c) {
  return required_if(c.latent->attention_bias && c.latent->q_lora_rank.has_value());
}

Shape hidden(const ModelConfig& c, Index /*part*/) {
  return {c.hidden_size};
}

Shape vocab_by_hidden(const ModelConfig& c, Index /*part*/) {
  return {c.vocab_size, c.hidden_size};
}

Shape intermediate(const ModelConfig& c, Index /*part*/) {
  return {c.intermediate_size};
}

Shape intermediate_by_hidden(const ModelConfig& c, Index /*part*/) {
  return {c.intermediate_size, c.hidden_size};
}

Shape hidden_by_intermediate(const ModelConfig& c, Index /*part*/) {
  return {c.hidden_size, c.intermediate_size};
}

Shape mla_q_b_shape(const ModelConfig& c, Index /*part*/) {
  const Index inputs = c.latent->normed_heads ? c.latent->normed_heads->head_dim : c.hidden_size;
  return {mla_q_rows(c), c.latent->q_lora_rank.value_or(inputs)};
}

Index latent_inputs(const ModelConfig& c) {
  return c.latent->normed_heads ? c.latent->normed_heads->inputs() : c.hidden_size;
}

Shape mla_q_bias_shape(const ModelConfig& c, Index /*part*/) {
  return {mla_q_rows(c)};
}

Shape q_a_shape(const ModelConfig& c, Index /*part*/) {
  return {c.latent->q_lora_rank.value_or(0), c.hidden_size};
}

Shape q_a_vector_shape(const ModelConfig& c, Index /*part*/) {
  return {c.latent->q_lora_rank.value_or(0)};
}

Shape kv_a_shape(const ModelConfig& c, Index /*part*/) {
  return {c.latent->kv_lora_rank + c.latent->qk_rope_head_dim, c.hidden_size};
}

Shape kv_a_bias_shape(const ModelConfig& c, Index /*part*/) {
  return {c.latent->kv_lora_rank + c.latent->qk_rope_head_dim};
}

Shape mla_o_shape(const ModelConfig& c, Index /*part*/) {
  return {c.hidden_size, c.num_attention_heads * c.latent->v_head_dim};
}

Index branch_count(const ModelConfig& c) {
  return static_cast<Index>(c.latent->branches.size());
}

Shape kv_a_norm_shape(const ModelConfig& c, Index /*part*/) {
  return {c.latent->kv_lora_rank};
}

Shape branch_norm_shape(const ModelConfig& c, Index part) {
  return {branch_of(c, part).whole_rank(c.latent->shared_ranks)};
}

Shape branch_up_shape(const ModelConfig& c, Index part) {
  const BranchGeometry& branch = branch_of(c, part);
  return {branch.head_count * (c.latent->qk_nope_head_dim + c.latent->v_head_dim),
          branch.whole_rank(c.latent->shared_ranks)};
}

Presence with_input_norms(const ModelConfig& c) {
  return required_if(c.norms != NormPlacement::behind);
}

Presence with_output_norms(const ModelConfig& c) {
  return required_if(c.norms != NormPlacement::before);
}

std::vector<TensorRule> append(std::vector<TensorRule> rules, const std::vector<TensorRule>& more) {
  rules.insert(rules.end(), more.begin(), more.end());
  return rules;
}

std::vector<TensorRule> with_body(std::vector<TensorRule> attention) {
  std::vector<TensorRule> rules = {
      {Role::embed_tokens, "model.embed_tokens.weight", required, vocab_by_hidden},
      {Role::final_norm, "model.norm.weight", required, hidden},
      {Role::lm_head, "lm_head.weight", head_presence, vocab_by_hidden},
      {Role::input_norm, "model.layers.{i}.input_layernorm.weight", with_input_norms, hidden},
      {Role::post_attention_norm, "model.layers.{i}.post_attention_layernorm.weight", with_input_norms,
       hidden},
      {Role::gate_weight, "model.layers.{i}.mlp.gate_proj.weight", required, intermediate_by_hidden, nullptr,
       InLayers::dense},
      {Role::up_weight, "model.layers.{i}.mlp.up_proj.weight", required, intermediate_by_hidden, nullptr,
       InLayers::dense},
      {Role::down_weight, "model.layers.{i}.mlp.down_proj.weight", required, hidden_by_intermediate, nullptr,
       InLayers::dense},
  };
  rules.insert(rules.end(), attention.begin(), attention.end());
  return rules;
}

std::vector<TensorRule> with_norm_names(std::vector<TensorRule> rules, const NormNames& names) {
  for (TensorRule& rule : rules) {
    if (rule.role == Role::post_attention_norm) {
      rule.name = names.mlp_input;
    }
  }
  return append(std::move(rules),
                {{Role::attention_output_norm, names.attention_output, with_output_norms, hidden},
                 {Role::mlp_output_norm, names.mlp_output, with_output_norms, hidden}});
}

std::vector<TensorRule> in_layers(WithAttention attention, std::vector<TensorRule> rules) {
  for (TensorRule& rule : rules) {
    rule.attention = attention;
  }
  return rules;
}

std::vector<TensorRule> grouped_query_attention(Presence (*qkv_bias)(const ModelConfig&)) {
  std::vector<TensorRule> rules = {
      {Role::q_weight, "model.layers.{i}.self_attn.q_proj.weight", required, q_shape},
      {Role::k_weight, "model.layers.{i}.self_attn.k_proj.weight", required, kv_shape},
      {Role::v_weight, "model.layers.{i}.self_attn.v_proj.weight", required, kv_shape},
      {Role::o_weight, "model.layers.{i}.self_attn.o_proj.weight", required, o_shape},
      {Role::inv_freq, "model.layers.{i}.self_attn.rotary_emb.inv_freq", optional, inv_freq_shape},
  };
  if (qkv_bias != nullptr) {
    rules.push_back({Role::q_bias, "model.layers.{i}.self_attn.q_proj.bias", qkv_bias, q_bias_shape});
    rules.push_back({Role::k_bias, "model.layers.{i}.self_attn.k_proj.bias", qkv_bias, kv_bias_shape});
    rules.push_back({Role::v_bias, "model.layers.{i}.self_attn.v_proj.bias", qkv_bias, kv_bias_shape});
  }
  return rules;
}

std::vector<TensorRule> grouped_query(Presence (*qkv_bias)(const ModelConfig&)) {
  return with_body(grouped_query_attention(qkv_bias));
}

std::vector<TensorRule> with_qk_norm(std::vector<TensorRule> rules) {
  return append(
      std::move(rules),
      {{Role::q_head_norm, "model.layers.{i}.self_attn.q_norm.weight", with_head_norms, q_head_norm_shape},
       {Role::k_head_norm, "model.layers.{i}.self_attn.k_norm.weight", with_head_norms, k_head_norm_shape}});
}

std::vector<TensorRule> grouped_query_with_biases() {
  return append(grouped_query(optional),
                {{Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", optional, hidden},
                 {Role::gate_bias, "model.layers.{i}.mlp.gate_proj.bias", optional, intermediate},
                 {Role::up_bias, "model.layers.{i}.mlp.up_proj.bias", optional, intermediate},
                 {Role::down_bias, "model.layers.{i}.mlp.down_proj.bias", optional, hidden}});
}

FusedTensor fused_queries_keys_and_values() {
  return {"model.layers.{i}.self_attn.qkv_proj.weight",
          {{"model.layers.{i}.self_attn.q_proj.weight", q_rows},
           {"model.layers.{i}.self_attn.k_proj.weight", kv_rows},
           {"model.layers.{i}.self_attn.v_proj.weight", kv_rows}}};
}

FusedTensor fused_gate_and_up() {
  const auto rows = [](const ModelConfig& c) { return c.intermediate_size; };
  return {"model.layers.{i}.mlp.gate_up_proj.weight",
          {{"model.layers.{i}.mlp.gate_proj.weight", rows}, {"model.layers.{i}.mlp.up_proj.weight", rows}}};
}

std::vector<TensorRule> grouped_query_by_config() {
  return append(with_qk_norm(grouped_query(with_gqa_bias)),
                {{Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", with_gqa_bias, hidden}});
}

std::vector<TensorRule> with_experts(std::vector<TensorRule> rules, const ExpertNames& names) {
  const auto one = [](Role role, std::string_view name, Presence (*presence)(const ModelConfig&),
                      Shape (*shape)(const ModelConfig&, Index)) {
    return TensorRule{role, name, presence, shape, nullptr, InLayers::experts};
  };
  const auto each = [](Role role, std::string_view name, Shape (*shape)(const ModelConfig&, Index)) {
    return TensorRule{role, name, required, shape, expert_count, InLayers::experts};
  };
  return append(std::move(rules),
                {one(Role::router_weight, names.router, required, router_shape),
                 one(Role::router_bias, "model.layers.{i}.mlp.gate.e_score_correction_bias", with_router_bias,
                     router_bias_shape),
                 each(Role::expert_gate_weight, names.gate, expert_by_hidden),
                 each(Role::expert_up_weight, names.up, expert_by_hidden),
                 each(Role::expert_down_weight, names.down, hidden_by_expert),
                 one(Role::shared_gate_weight, names.shared_gate, with_shared_experts, shared_by_hidden),
                 one(Role::shared_up_weight, names.shared_up, with_shared_experts, shared_by_hidden),
                 one(Role::shared_down_weight, names.shared_down, with_shared_experts, hidden_by_shared),
                 one(Role::shared_expert_gate, "model.layers.{i}.mlp.shared_expert_gate.weight",
                     with_shared_gate, one_by_hidden)});
}

}  // namespace relatent::rules
