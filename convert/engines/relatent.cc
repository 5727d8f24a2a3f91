#include "convert/engines/relatent.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

#include "convert/engines/hf_files.h"
#include "convert/engines/layout.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

void put_experts(const ExpertsGeometry& experts, Json& out) {
  const bool grouped = experts.topk_method != TopkMethod::greedy;
  out["first_k_dense_replace"] = experts.first_layer;
  if (!experts.dense_layers.empty()) {
    out["mlp_only_layers"] = experts.dense_layers;
  }
  out["moe_intermediate_size"] = experts.intermediate_size;
  out["n_group"] = grouped ? Json(experts.groups) : Json(nullptr);
  out["n_routed_experts"] = experts.count;
  out["n_shared_experts"] = experts.shared_gate ? 0 : experts.shared_size / experts.intermediate_size;
  out["norm_topk_prob"] = experts.normalised;
  out["num_experts_per_tok"] = experts.per_token;
  out["routed_scaling_factor"] = experts.scale;
  if (experts.shared_gate) {
    out["shared_expert_intermediate_size"] = experts.shared_size;
  }
  out["scoring_func"] = experts.topk_method == TopkMethod::noaux_tc ? "sigmoid" : "softmax";
  out["topk_group"] = grouped ? Json(experts.groups_per_token) : Json(nullptr);
  out["topk_method"] = topk_method_name(experts.topk_method);
}

// `layers` and `rope_lists` of a model some of whose layers are carried.
void put_layers(const ModelConfig& source, const CarriedLayers& carried, Json& out) {
  std::vector<const Rotary*> lists;
  out["layers"] = Json::array();
  for (Index i = 0; i < source.num_hidden_layers; ++i) {
    if (!carried.layers.has(i)) {
      out["layers"].push_back(nullptr);
      continue;
    }
    const AttentionSpec& spec = source.spec(i);
    auto list = std::find(lists.begin(), lists.end(), &source.rotary_of(i));
    if (list == lists.end()) {
      list = lists.insert(list, &source.rotary_of(i));
    }
    out["layers"].push_back({{"attention", "grouped_query"},
                             {"head_dim", source.gqa->head_dim},
                             {"num_key_value_heads", source.gqa->num_key_value_heads},
                             {"o_bias", carried.o_bias},
                             {"qk_norm", qk_norm_name(source.gqa->qk_norm)},
                             {"qkv_bias", carried.qkv_bias},
                             {"rope_list", list - lists.begin()},
                             {"scaling", spec.scale},
                             {"sliding_window", spec.window ? Json(*spec.window) : Json(nullptr)}});
  }
  out["rope_lists"] = Json::array();
  for (const Rotary* list : lists) {
    out["rope_lists"].push_back(explicit_rope_parameters(*list, source.max_position_embeddings));
  }
}

// What the source has beyond Llama.
void put_body_extras(const ModelConfig& source, Json& out) {
  if (source.activation != Activation::silu) {
    out["hidden_activation"] = activation_name(source.activation);
  }
  if (source.norms != NormPlacement::before) {
    out["norm_placement"] = norm_placement_name(source.norms);
  }
  if (source.norm_unit_offset) {
    out["norm_unit_offset"] = true;
  }
  if (source.embedding_multiplier != 1) {
    out["embedding_multiplier"] = source.embedding_multiplier;
  }
  if (source.residual_multiplier != 1) {
    out["residual_multiplier"] = source.residual_multiplier;
  }
  if (source.logits_scaling != 1) {
    out["logits_scaling"] = source.logits_scaling;
  }
  if (source.attn_logit_softcapping) {
    out["attn_logit_softcapping"] = *source.attn_logit_softcapping;
  }
  if (source.final_logit_softcapping) {
    out["final_logit_softcapping"] = *source.final_logit_softcapping;
  }
}

// What engines/vllm refuses is what it has no code for.
bool plug_in_holds(const ModelConfig& config) {
  return !config.gqa && config.activation == Activation::silu && config.norms == NormPlacement::before &&
         !config.norm_unit_offset && config.embedding_multiplier == 1 && config.residual_multiplier == 1 &&
         config.logits_scaling == 1 && config.still_layers().empty() && !config.attn_logit_softcapping &&
         !config.final_logit_softcapping;
}

// Rows of zeros behind those of a projection.
Linear padded_rows(const Linear& linear, Index count) {
  if (count == 0) {
    return linear;
  }
  Linear out{MatrixF::Zero(linear.out() + count, linear.weight.cols()), {}};
  out.weight.topRows(linear.out()) = linear.weight;
  if (linear.bias.size() > 0) {
    out.bias = RowVectorF::Zero(linear.out() + count);
    out.bias.head(linear.out()) = linear.bias;
  }
  return out;
}

class RelatentEngine final : public Engine {
 public:
  std::string_view name() const override { return "relatent"; }

  std::string_view family() const override { return "relatent"; }

  EngineTraits traits() const override {
    return {.forms = {},
            .layer_frequencies = true,
            .pads_latent = true,
            .any_cache_shape = true,
            .normed_heads = true,
            .layer_kinds = true};
  }

  std::string why_not_source(const ModelConfig& /*source*/) const override { return ""; }

  Json config(const Json& source_config, const ModelConfig& source, const LatentShape& shape,
              const Rotary& rotary, DType dtype) const override {
    Json out;
    out["architectures"] = {"RelatentForCausalLM"};
    out["model_type"] = "relatent";
    out["auto_map"] = {{"AutoConfig", "configuration_relatent.RelatentConfig"},
                       {"AutoModel", "modeling_relatent.RelatentModel"},
                       {"AutoModelForCausalLM", "modeling_relatent.RelatentForCausalLM"}};
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
      if (source_config.contains(key)) {
        out[key] = source_config[key];
      }
    }
    out["attention_bias"] = shape.attention_bias;
    out["dtype"] = torch_name(dtype);
    out["head_dim"] = shape.qk_rope_head_dim;  // what transformers takes for the size of the rotary embedding
    out["hidden_act"] = "silu";
    out["hidden_size"] = source.hidden_size;
    out["intermediate_size"] = source.intermediate_size;
    out["kv_lora_rank"] = shape.kv_lora_rank + shape.dead_coordinates;
    out["latent_branches"] = Json::array();
    for (const BranchGeometry& branch : shape.branches) {
      Json entry = {{"first_head", branch.first_head}, {"num_heads", branch.head_count}};
      entry["shared"] = branch.shared ? Json(*branch.shared) : Json(nullptr);
      entry["rank"] = branch.rank + shape.dead_coordinates;
      out["latent_branches"].push_back(std::move(entry));
    }
    out["latent_features"] = shape.normed_heads ? "normed_heads" : "hidden";
    out["latent_form"] = shape.form;
    out["latent_norm"] = norm_name(shape.norm);
    out["latent_norm_rank"] = shape.norm == LatentNorm::replicated ? Json(shape.norm_rank) : Json(nullptr);
    out["latent_shared_ranks"] = shape.shared_ranks;
    out["layout_version"] = 1;
    out["max_position_embeddings"] = source.max_position_embeddings;
    out["num_attention_heads"] = shape.heads;
    out["num_hidden_layers"] = source.num_hidden_layers;
    if (shape.normed_heads) {
      out["normed_bias"] = shape.normed_heads->bias;
      out["normed_head_dim"] = shape.normed_heads->head_dim;
      out["num_key_value_heads"] = shape.normed_heads->num_key_value_heads;
      out["qk_norm"] = qk_norm_name(shape.normed_heads->norm);
    }
    out["q_lora_rank"] = shape.q_lora_rank ? Json(*shape.q_lora_rank) : Json(nullptr);
    out["qk_nope_head_dim"] = shape.qk_nope_head_dim;
    out["qk_rope_head_dim"] = shape.qk_rope_head_dim;
    out["rms_norm_eps"] = source.rms_norm_eps;
    out["rope_parameters"] = explicit_rope_parameters(rotary, source.max_position_embeddings);
    out["tie_word_embeddings"] = source.tie_word_embeddings;
    out["use_cache"] = true;
    out["v_head_dim"] = shape.v_head_dim;
    out["vocab_size"] = source.vocab_size;
    if (const LayerSet still = source.still_layers(); !still.empty()) {
      out["no_rope_layers"] = Json::array();
      for (Index i = 0; i < source.num_hidden_layers; ++i) {
        out["no_rope_layers"].push_back(still.has(i) ? 0 : 1);
      }
    }
    if (source.experts) {
      put_experts(*source.experts, out);
    }
    if (!shape.carried.layers.empty()) {
      put_layers(source, shape.carried, out);
    }
    put_body_extras(source, out);
    return out;
  }

  void put_layer_rotaries(const std::vector<Rotary>& rotaries, const ModelConfig& source,
                          const LatentShape& shape, Json& config) const override {
    Json& lists = config.emplace("rope_lists", Json::array()).first.value();
    const auto first = static_cast<Index>(lists.size());
    Json named = Json::array();
    Index next = 0;
    for (Index i = 0; i < source.num_hidden_layers; ++i) {
      named.push_back(shape.carried.layers.has(i) ? Json(nullptr) : Json(first + next++));
    }
    for (const Rotary& rotary : rotaries) {
      lists.push_back(explicit_rope_parameters(rotary, source.max_position_embeddings));
    }
    config["latent_rope_lists"] = std::move(named);
    // Older readers would rotate every layer by rope_parameters.
    config["layout_version"] = 2;
  }

  std::vector<ExtraFile> extra_files() const override { return hf_files(); }

  std::vector<std::string> readers(const ModelConfig& config) const override {
    return {plug_in_holds(config)
                ? "read by vLLM with the relatent-vllm plug-in: vllm serve FOLDER"
                : "not read by vLLM yet: the relatent-vllm plug-in refuses what this model has",
            "read by transformers with the code beside the weights: trust_remote_code=True"};
  }

  void write_attention(const LatentAttention& a, const LatentShape& shape, DType /*dtype*/,
                       const LayerWriter& out) const override {
    const auto put_linear = [&](Role weight, Role bias, const Linear& linear, std::optional<Index> part = {},
                                float factor = 1) {
      out.put(weight, MatrixF(linear.weight * factor), part);
      if (shape.attention_bias) {
        out.put(bias, RowVectorF(bias_or_zero(linear) * factor), part);
      }
    };
    // The reader multiplies scores by (n + p)^-1/2; the difference to the wanted scale goes into the query.
    const auto rescale =
        static_cast<float>(static_cast<double>(a.scale) *
                           std::sqrt(static_cast<double>(shape.qk_nope_head_dim + shape.qk_rope_head_dim)));
    if (shape.q_lora_rank) {
      put_linear(Role::q_a_weight, Role::q_a_bias, a.q_down);
      out.put(Role::q_a_norm, a.q_norm.gain);
      out.put(Role::q_weight, MatrixF(a.q.weight * rescale));
    } else {
      put_linear(Role::q_weight, Role::q_bias, a.q, {}, rescale);
    }
    put_linear(Role::k_rope_weight, Role::k_rope_bias, a.rotary_key);
    if (shape.norm == LatentNorm::replicated) {
      out.put(Role::kv_norm_weight, a.norm_rows);
    }
    for (std::size_t s = 0; s < a.shared.size(); ++s) {
      put_linear(Role::kv_shared_weight, Role::kv_shared_bias, a.shared[s], static_cast<Index>(s));
    }
    for (std::size_t b = 0; b < a.branches.size(); ++b) {
      const LatentBranch& branch = a.branches[b];
      const auto part = static_cast<Index>(b);
      put_linear(Role::kv_a_weight, Role::kv_a_bias, padded_rows(branch.down, shape.dead_coordinates), part);
      if (shape.norm == LatentNorm::branch) {
        out.put(Role::kv_a_norm, branch.norm.gain, part);
      }
      MatrixF up = MatrixF::Zero(branch.up.rows(), branch.up.cols() + shape.dead_coordinates);
      up.leftCols(branch.up.cols()) = branch.up;
      out.put(Role::kv_b_weight, up, part);
    }
    // The multiplier is a part of o here, and the reader has one of its own.
    put_linear(Role::o_weight, Role::o_bias, a.o, {}, static_cast<float>(1 / shape.residual_multiplier));
  }
};

}  // namespace

std::unique_ptr<Engine> make_relatent_engine() {
  return std::make_unique<RelatentEngine>();
}

}  // namespace relatent
