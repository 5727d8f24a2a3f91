#include "convert/model/families.h"

#include <algorithm>
#include <map>
#include <set>

#include "convert/model/config.h"
#include "formats/checkpoint.h"
#include "formats/error.h"

namespace relatent {
namespace {

using Shape = std::vector<Index>;
using Config = ModelConfig;

Presence required(const Config& /*config*/) {
  return Presence::required;
}
Presence optional(const Config& /*config*/) {
  return Presence::optional;
}
Presence required_if(bool condition) {
  return condition ? Presence::required : Presence::absent;
}
// A tied model may store the head again; the embedding is what counts.
Presence head_presence(const Config& c) {
  return c.tie_word_embeddings ? Presence::optional : Presence::required;
}
Presence with_q_rank(const Config& c) {
  return required_if(c.latent->q_lora_rank.has_value());
}
Presence without_q_rank(const Config& c) {
  return required_if(!c.latent->q_lora_rank.has_value());
}
Presence with_bias(const Config& c) {
  return required_if(c.latent->attention_bias);
}
Presence with_q_rank_and_bias(const Config& c) {
  return required_if(c.latent->attention_bias && c.latent->q_lora_rank.has_value());
}

Shape hidden(const Config& c, Index /*part*/) {
  return {c.hidden_size};
}
Shape vocab_by_hidden(const Config& c, Index /*part*/) {
  return {c.vocab_size, c.hidden_size};
}
Shape inner(const Config& c, Index /*part*/) {
  return {c.intermediate_size};
}
Shape inner_by_hidden(const Config& c, Index /*part*/) {
  return {c.intermediate_size, c.hidden_size};
}
Shape hidden_by_inner(const Config& c, Index /*part*/) {
  return {c.hidden_size, c.intermediate_size};
}

// The tensors that every family shares.
std::vector<TensorRule> with_common(std::vector<TensorRule> attention) {
  std::vector<TensorRule> rules = {
      {Role::embed_tokens, "model.embed_tokens.weight", required, vocab_by_hidden},
      {Role::final_norm, "model.norm.weight", required, hidden},
      {Role::lm_head, "lm_head.weight", head_presence, vocab_by_hidden},
      {Role::input_norm, "model.layers.{i}.input_layernorm.weight", required, hidden},
      {Role::post_attention_norm, "model.layers.{i}.post_attention_layernorm.weight", required, hidden},
      {Role::gate_weight, "model.layers.{i}.mlp.gate_proj.weight", required, inner_by_hidden, nullptr,
       InLayers::dense},
      {Role::up_weight, "model.layers.{i}.mlp.up_proj.weight", required, inner_by_hidden, nullptr,
       InLayers::dense},
      {Role::down_weight, "model.layers.{i}.mlp.down_proj.weight", required, hidden_by_inner, nullptr,
       InLayers::dense},
  };
  rules.insert(rules.end(), attention.begin(), attention.end());
  return rules;
}

Index q_rows(const Config& c) {
  return c.num_attention_heads * c.gqa->head_dim;
}
Index kv_rows(const Config& c) {
  return c.gqa->num_key_value_heads * c.gqa->head_dim;
}
Shape q_shape(const Config& c, Index /*part*/) {
  return {q_rows(c), c.hidden_size};
}
Shape kv_shape(const Config& c, Index /*part*/) {
  return {kv_rows(c), c.hidden_size};
}
Shape o_shape(const Config& c, Index /*part*/) {
  return {c.hidden_size, q_rows(c)};
}
Shape q_bias_shape(const Config& c, Index /*part*/) {
  return {q_rows(c)};
}
Shape kv_bias_shape(const Config& c, Index /*part*/) {
  return {kv_rows(c)};
}
Shape inv_freq_shape(const Config& c, Index /*part*/) {
  return {c.gqa->head_dim / 2};
}

std::vector<TensorRule> gqa_rules(Presence (*qkv_bias)(const Config&)) {
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
  return with_common(std::move(rules));
}

Index mla_q_rows(const Config& c) {
  return c.num_attention_heads * (c.latent->qk_nope_head_dim + c.latent->qk_rope_head_dim);
}
Shape mla_q_b_shape(const Config& c, Index /*part*/) {
  return {mla_q_rows(c), c.latent->q_lora_rank.value_or(c.hidden_size)};
}
Shape q_a_shape(const Config& c, Index /*part*/) {
  return {c.latent->q_lora_rank.value_or(0), c.hidden_size};
}
Shape q_a_vector_shape(const Config& c, Index /*part*/) {
  return {c.latent->q_lora_rank.value_or(0)};
}
Shape kv_a_shape(const Config& c, Index /*part*/) {
  return {c.latent->kv_lora_rank + c.latent->qk_rope_head_dim, c.hidden_size};
}
Shape kv_a_bias_shape(const Config& c, Index /*part*/) {
  return {c.latent->kv_lora_rank + c.latent->qk_rope_head_dim};
}
Shape kv_a_norm_shape(const Config& c, Index /*part*/) {
  return {c.latent->kv_lora_rank};
}
Shape kv_b_shape(const Config& c, Index /*part*/) {
  return {c.num_attention_heads * (c.latent->qk_nope_head_dim + c.latent->v_head_dim),
          c.latent->kv_lora_rank};
}
Shape mla_o_shape(const Config& c, Index /*part*/) {
  return {c.hidden_size, c.num_attention_heads * c.latent->v_head_dim};
}

std::vector<TensorRule> append(std::vector<TensorRule> rules, const std::vector<TensorRule>& more) {
  rules.insert(rules.end(), more.begin(), more.end());
  return rules;
}

std::vector<TensorRule> llama_rules() {
  return append(gqa_rules(optional),
                {{Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", optional, hidden},
                 {Role::gate_bias, "model.layers.{i}.mlp.gate_proj.bias", optional, inner},
                 {Role::up_bias, "model.layers.{i}.mlp.up_proj.bias", optional, inner},
                 {Role::down_bias, "model.layers.{i}.mlp.down_proj.bias", optional, hidden}});
}

Presence with_router_bias(const Config& c) {
  return required_if(c.experts && c.experts->topk_method == TopkMethod::noaux_tc);
}
Index expert_count(const Config& c) {
  return c.experts ? c.experts->count : 0;
}
Shape router_shape(const Config& c, Index /*part*/) {
  return {c.experts->count, c.hidden_size};
}
Shape router_bias_shape(const Config& c, Index /*part*/) {
  return {c.experts->count};
}
Shape expert_by_hidden(const Config& c, Index /*part*/) {
  return {c.experts->intermediate_size, c.hidden_size};
}
Shape hidden_by_expert(const Config& c, Index /*part*/) {
  return {c.hidden_size, c.experts->intermediate_size};
}
Shape shared_by_hidden(const Config& c, Index /*part*/) {
  return {c.experts->shared * c.experts->intermediate_size, c.hidden_size};
}
Shape hidden_by_shared(const Config& c, Index /*part*/) {
  return {c.hidden_size, c.experts->shared * c.experts->intermediate_size};
}

// Named as DeepSeek publishes them, one tensor for each expert.
std::vector<TensorRule> with_experts(std::vector<TensorRule> rules) {
  const auto one = [](Role role, std::string_view name, Presence (*presence)(const Config&),
                      Shape (*shape)(const Config&, Index)) {
    return TensorRule{role, name, presence, shape, nullptr, InLayers::experts};
  };
  const auto each = [](Role role, std::string_view name, Shape (*shape)(const Config&, Index)) {
    return TensorRule{role, name, required, shape, expert_count, InLayers::experts};
  };
  return append(
      std::move(rules),
      {one(Role::router_weight, "model.layers.{i}.mlp.gate.weight", required, router_shape),
       one(Role::router_bias, "model.layers.{i}.mlp.gate.e_score_correction_bias", with_router_bias,
           router_bias_shape),
       each(Role::expert_gate_weight, "model.layers.{i}.mlp.experts.{b}.gate_proj.weight", expert_by_hidden),
       each(Role::expert_up_weight, "model.layers.{i}.mlp.experts.{b}.up_proj.weight", expert_by_hidden),
       each(Role::expert_down_weight, "model.layers.{i}.mlp.experts.{b}.down_proj.weight", hidden_by_expert),
       one(Role::shared_gate_weight, "model.layers.{i}.mlp.shared_experts.gate_proj.weight", required,
           shared_by_hidden),
       one(Role::shared_up_weight, "model.layers.{i}.mlp.shared_experts.up_proj.weight", required,
           shared_by_hidden),
       one(Role::shared_down_weight, "model.layers.{i}.mlp.shared_experts.down_proj.weight", required,
           hidden_by_shared)});
}

std::vector<TensorRule> deepseek_rules() {
  return with_experts(with_common({
      {Role::q_weight, "model.layers.{i}.self_attn.q_proj.weight", without_q_rank, mla_q_b_shape},
      {Role::q_a_weight, "model.layers.{i}.self_attn.q_a_proj.weight", with_q_rank, q_a_shape},
      {Role::q_a_bias, "model.layers.{i}.self_attn.q_a_proj.bias", with_q_rank_and_bias, q_a_vector_shape},
      {Role::q_a_norm, "model.layers.{i}.self_attn.q_a_layernorm.weight", with_q_rank, q_a_vector_shape},
      {Role::q_weight, "model.layers.{i}.self_attn.q_b_proj.weight", with_q_rank, mla_q_b_shape},
      {Role::kv_a_weight, "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight", required, kv_a_shape},
      {Role::kv_a_bias, "model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias", with_bias, kv_a_bias_shape},
      {Role::kv_a_norm, "model.layers.{i}.self_attn.kv_a_layernorm.weight", required, kv_a_norm_shape},
      {Role::kv_b_weight, "model.layers.{i}.self_attn.kv_b_proj.weight", required, kv_b_shape},
      {Role::o_weight, "model.layers.{i}.self_attn.o_proj.weight", required, mla_o_shape},
      {Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", with_bias, hidden},
  }));
}

Index part_count(const Config& c) {
  return static_cast<Index>(c.latent->branches.size());
}
Index shared_count(const Config& c) {
  return static_cast<Index>(c.latent->shared_ranks.size());
}
const BranchGeometry& branch_of(const Config& c, Index part) {
  return c.latent->branches[static_cast<std::size_t>(part)];
}
Presence with_branch_norm(const Config& c) {
  return required_if(c.latent->norm == LatentNorm::branch);
}
Presence with_replicated_norm(const Config& c) {
  return required_if(c.latent->norm == LatentNorm::replicated);
}
Presence without_q_rank_with_bias(const Config& c) {
  return required_if(c.latent->attention_bias && !c.latent->q_lora_rank.has_value());
}
Shape mla_q_bias_shape(const Config& c, Index /*part*/) {
  return {mla_q_rows(c)};
}
Shape k_rope_shape(const Config& c, Index /*part*/) {
  return {c.latent->qk_rope_head_dim, c.hidden_size};
}
Shape k_rope_bias_shape(const Config& c, Index /*part*/) {
  return {c.latent->qk_rope_head_dim};
}
Shape kv_norm_shape(const Config& c, Index /*part*/) {
  return {c.latent->norm_rank, c.hidden_size};
}
Shape shared_shape(const Config& c, Index part) {
  return {c.latent->shared_ranks[static_cast<std::size_t>(part)], c.hidden_size};
}
Shape shared_bias_shape(const Config& c, Index part) {
  return {c.latent->shared_ranks[static_cast<std::size_t>(part)]};
}
Shape branch_down_shape(const Config& c, Index part) {
  return {branch_of(c, part).rank, c.hidden_size};
}
Shape branch_bias_shape(const Config& c, Index part) {
  return {branch_of(c, part).rank};
}
Shape branch_norm_shape(const Config& c, Index part) {
  return {branch_of(c, part).whole_rank(c.latent->shared_ranks)};
}
Shape branch_up_shape(const Config& c, Index part) {
  const BranchGeometry& branch = branch_of(c, part);
  return {branch.head_count * (c.latent->qk_nope_head_dim + c.latent->v_head_dim),
          branch.whole_rank(c.latent->shared_ranks)};
}

// Our own layout of the canonical latent form (engines/relatent.h).
std::vector<TensorRule> relatent_rules() {
  return with_experts(with_common({
      {Role::q_weight, "model.layers.{i}.self_attn.q_proj.weight", without_q_rank, mla_q_b_shape},
      {Role::q_bias, "model.layers.{i}.self_attn.q_proj.bias", without_q_rank_with_bias, mla_q_bias_shape},
      {Role::q_a_weight, "model.layers.{i}.self_attn.q_a_proj.weight", with_q_rank, q_a_shape},
      {Role::q_a_bias, "model.layers.{i}.self_attn.q_a_proj.bias", with_q_rank_and_bias, q_a_vector_shape},
      {Role::q_a_norm, "model.layers.{i}.self_attn.q_a_layernorm.weight", with_q_rank, q_a_vector_shape},
      {Role::q_weight, "model.layers.{i}.self_attn.q_b_proj.weight", with_q_rank, mla_q_b_shape},
      {Role::k_rope_weight, "model.layers.{i}.self_attn.k_rope_proj.weight", required, k_rope_shape},
      {Role::k_rope_bias, "model.layers.{i}.self_attn.k_rope_proj.bias", with_bias, k_rope_bias_shape},
      {Role::kv_norm_weight, "model.layers.{i}.self_attn.kv_norm_proj.weight", with_replicated_norm,
       kv_norm_shape},
      {Role::kv_shared_weight, "model.layers.{i}.self_attn.kv_shared_proj.{b}.weight", required, shared_shape,
       shared_count},
      {Role::kv_shared_bias, "model.layers.{i}.self_attn.kv_shared_proj.{b}.bias", with_bias,
       shared_bias_shape, shared_count},
      {Role::kv_a_weight, "model.layers.{i}.self_attn.kv_a_proj.{b}.weight", required, branch_down_shape,
       part_count},
      {Role::kv_a_bias, "model.layers.{i}.self_attn.kv_a_proj.{b}.bias", with_bias, branch_bias_shape,
       part_count},
      {Role::kv_a_norm, "model.layers.{i}.self_attn.kv_a_layernorm.{b}.weight", with_branch_norm,
       branch_norm_shape, part_count},
      {Role::kv_b_weight, "model.layers.{i}.self_attn.kv_b_proj.{b}.weight", required, branch_up_shape,
       part_count},
      {Role::o_weight, "model.layers.{i}.self_attn.o_proj.weight", required, mla_o_shape},
      {Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", with_bias, hidden},
  }));
}

// The MLRA authors' layout (engines/mlra.h). Models of two latents name them one by one.
Presence with_two(const Config& c) {
  return required_if(c.latent->branches.size() == 2);
}
Presence with_four(const Config& c) {
  return required_if(c.latent->branches.size() == 4);
}
// Input-major: the transpose of each latent's up-projection.
Shape stacked_up_shape(const Config& c, Index /*part*/) {
  const Shape up = branch_up_shape(c, 0);
  return {part_count(c), up[1], up[0]};
}

std::vector<TensorRule> mlra_rules() {
  return {
      {Role::embed_tokens, "transformer.wte.weight", required, vocab_by_hidden},
      {Role::final_norm, "layernorm.weight", required, hidden},
      {Role::lm_head, "lm_head.weight", head_presence, vocab_by_hidden},
      {Role::input_norm, "transformer.h.{i}.input_layernorm.weight", required, hidden},
      {Role::post_attention_norm, "transformer.h.{i}.post_attention_layernorm.weight", required, hidden},
      {Role::gate_weight, "transformer.h.{i}.mlp.c_fc1.weight", required, inner_by_hidden},
      {Role::up_weight, "transformer.h.{i}.mlp.c_fc2.weight", required, inner_by_hidden},
      {Role::down_weight, "transformer.h.{i}.mlp.c_proj.weight", required, hidden_by_inner},
      {Role::q_a_weight, "transformer.h.{i}.attn.q_a_proj.weight", required, q_a_shape},
      {Role::q_a_norm, "transformer.h.{i}.attn.q_a_layernorm.weight", required, q_a_vector_shape},
      {Role::q_weight, "transformer.h.{i}.attn.q_b_proj.weight", required, mla_q_b_shape},
      {Role::kv_a_weight, "transformer.h.{i}.attn.kv_a_proj_with_mqa.weight", required, kv_a_shape},
      {Role::kv_a_norm, "transformer.h.{i}.attn.kv_a_layernorm_{c}.weight", with_two, branch_norm_shape,
       part_count},
      {Role::kv_a_norm, "transformer.h.{i}.attn.kv_a_layernorms.{b}.weight", with_four, branch_norm_shape,
       part_count},
      {Role::kv_b_weight, "transformer.h.{i}.attn.kv_b_proj_{c}.weight", with_two, branch_up_shape,
       part_count},
      {Role::kv_b_weight, "transformer.h.{i}.attn.kv_b_proj", with_four, stacked_up_shape},
      {Role::o_weight, "transformer.h.{i}.attn.c_proj.weight", required, mla_o_shape},
  };
}

Shape branch_up_bias_shape(const Config& c, Index part) {
  return {branch_up_shape(c, part)[0]};
}

// The GLA authors' module (engines/gla.h).
std::vector<TensorRule> gla_rules() {
  return with_common({
      {Role::q_a_weight, "model.layers.{i}.self_attn.W_dQ.weight", required, q_a_shape},
      {Role::q_a_bias, "model.layers.{i}.self_attn.W_dQ.bias", required, q_a_vector_shape},
      {Role::q_a_norm, "model.layers.{i}.self_attn.q_norm.weight", required, q_a_vector_shape},
      {Role::q_weight, "model.layers.{i}.self_attn.W_uQ_rope.weight", required, mla_q_b_shape},
      {Role::q_bias, "model.layers.{i}.self_attn.W_uQ_rope.bias", required, mla_q_bias_shape},
      {Role::kv_a_weight, "model.layers.{i}.self_attn.W_dKV.weight", required, kv_a_shape},
      {Role::kv_a_bias, "model.layers.{i}.self_attn.W_dKV.bias", required, kv_a_bias_shape},
      {Role::kv_a_norm, "model.layers.{i}.self_attn.kv_norm_{c}.weight", required, branch_norm_shape,
       part_count},
      {Role::kv_b_weight, "model.layers.{i}.self_attn.W_ukv_{c}.weight", required, branch_up_shape,
       part_count},
      {Role::kv_b_bias, "model.layers.{i}.self_attn.W_ukv_{c}.bias", required, branch_up_bias_shape,
       part_count},
      {Role::o_weight, "model.layers.{i}.self_attn.o_proj.weight", required, mla_o_shape},
      {Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", with_bias, hidden},
  });
}

const std::vector<Family>& families() {
  static const std::vector<Family> all = {
      {"llama", false, llama_rules()},         {"mistral", false, gqa_rules(nullptr)},
      {"qwen2", false, gqa_rules(required)},   {"deepseek_v2", true, deepseek_rules()},
      {"deepseek_v3", true, deepseek_rules()}, {"relatent", true, relatent_rules()},
      {mlra_type, true, mlra_rules()},         {gla_type, true, gla_rules()},
  };
  return all;
}

std::string with_indices(std::string_view pattern, Index layer_idx, Index part) {
  std::string out(pattern);
  for (const auto& [mark, index] :
       {std::pair{"{i}", layer_idx}, std::pair{"{b}", part}, std::pair{"{c}", part + 1}}) {
    const std::size_t at = out.find(mark);
    if (at != std::string::npos) {
      out.replace(at, 3, std::to_string(index));
    }
  }
  return out;
}

std::string list_names(const std::set<std::string>& names) {
  constexpr std::size_t shown = 12;
  std::string out;
  std::size_t n = 0;
  for (const std::string& name : names) {
    if (n == shown) {
      return out + " and " + std::to_string(names.size() - shown) + " more";
    }
    out += (n++ == 0 ? "" : ", ") + name;
  }
  return out;
}

// The scales beside FP8 weights, named before their many weights are.
void refuse_fp8(const Checkpoint& checkpoint, const std::set<std::string>& names) {
  const auto scale =
      std::find_if(names.begin(), names.end(), [](const auto& name) { return name.ends_with("_scale_inv"); });
  if (scale != names.end()) {
    fail_input({checkpoint.file_of(*scale).path(), *scale, "holds scales of FP8 weights",
                "weights in BF16, F16 or F32", "quantised ones",
                "cast them to bfloat16 first, as DeepSeek's fp8_cast_bf16.py does"});
  }
}

// Moves the tensors of layers that predict further tokens from one to the other.
void place_prediction_layers(const ModelConfig& config, std::set<std::string>& unplaced,
                             std::vector<PlacedTensor>& placed) {
  for (Index i = 0; i < config.prediction_layers; ++i) {
    const Index layer_idx = config.num_hidden_layers + i;
    const std::string prefix = "model.layers." + std::to_string(layer_idx) + ".";
    auto at = unplaced.lower_bound(prefix);
    while (at != unplaced.end() && at->starts_with(prefix)) {
      placed.push_back({*at, Role::prediction, layer_idx});
      at = unplaced.erase(at);
    }
  }
}

}  // namespace

bool is_attention(Role role) {
  return role >= Role::q_weight && role <= Role::kv_shared_bias;
}

const Family* find_family(std::string_view model_type) {
  for (const Family& family : families()) {
    if (family.model_type == model_type) {
      return &family;
    }
  }
  return nullptr;
}

std::string known_model_types() {
  std::string out;
  for (const Family& family : families()) {
    out += (out.empty() ? "" : ", ") + std::string(family.model_type);
  }
  return out;
}

std::vector<PlacedTensor> place_tensors(const Checkpoint& checkpoint, const ModelConfig& config) {
  const Family& family = *find_family(config.model_type);
  std::set<std::string> unplaced;
  for (std::string& name : checkpoint.tensor_names()) {
    unplaced.insert(std::move(name));
  }
  refuse_fp8(checkpoint, unplaced);
  std::set<std::string> missing;
  std::vector<PlacedTensor> placed;
  for (const TensorRule& rule : family.rules) {
    const Presence presence = rule.presence(config);
    if (presence == Presence::absent) {
      continue;
    }
    const bool in_layer = rule.name.find("{i}") != std::string_view::npos;
    const Index layers = in_layer ? config.num_hidden_layers : 1;
    const Index parts = rule.parts != nullptr ? rule.parts(config) : 1;
    for (Index at = 0; at < layers * parts; ++at) {
      const Index layer_idx = in_layer ? at / parts : -1;
      const Index part = rule.parts != nullptr ? at % parts : -1;
      if (rule.layers != InLayers::all &&
          config.has_experts(layer_idx) != (rule.layers == InLayers::experts)) {
        continue;
      }
      const std::string name = with_indices(rule.name, layer_idx, part);
      if (unplaced.erase(name) == 0) {
        if (presence == Presence::required) {
          missing.insert(name);
        }
        continue;
      }
      const std::vector<Index> shape = rule.shape(config, part);
      const TensorInfo& info = checkpoint.info(name);
      if (info.shape != std::vector<std::int64_t>(shape.begin(), shape.end())) {
        fail_input({checkpoint.file_of(name).path(), name, "shape",
                    shape_text({shape.begin(), shape.end()}) + " by config.json", shape_text(info.shape),
                    ""});
      }
      if (!is_float(info.dtype)) {
        fail_input({checkpoint.file_of(name).path(), name, "dtype", "BF16, F16, F32 or F64",
                    std::string(safetensors_name(info.dtype)), ""});
      }
      placed.push_back({name, rule.role, layer_idx, part});
    }
  }
  place_prediction_layers(config, unplaced, placed);
  if (!unplaced.empty()) {
    fail_input({checkpoint.folder(), "", "tensors that have no place in a " + config.model_type + " model",
                "none", list_names(unplaced), ""});
  }
  if (!missing.empty()) {
    fail_input({checkpoint.folder(), "", "tensors that a " + config.model_type + " model needs are missing",
                list_names(missing), "no tensors of these names", ""});
  }
  return placed;
}

}  // namespace relatent
