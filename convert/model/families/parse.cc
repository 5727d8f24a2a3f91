#include "convert/model/families/parse.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "formats/error.h"

namespace relatent {
namespace {

TopkMethod parse_topk_method(const ConfigReader& in, const ExpertDefaults& defaults) {
  if (!in.has("topk_method") && defaults.topk_method) {
    return *defaults.topk_method;
  }
  const std::string found = in.text("topk_method");
  std::string allowed;
  for (const auto& [method, name] : topk_methods) {
    const bool sigmoid = method == TopkMethod::noaux_tc;
    if ((sigmoid && defaults.softmax_only) || (!sigmoid && defaults.sigmoid_only)) {
      continue;
    }
    if (found == name) {
      return method;
    }
    allowed += (allowed.empty() ? "" : " or ") + std::string(name);
  }
  in.complain("topk_method", allowed);
}

// Which layers slide where the config lists them one by one.
std::vector<bool> sliding_of_types(const ConfigReader& in, Index layers) {
  constexpr const char* key = "layer_types";
  const ConfigReader::Json& types = *in.find(key);
  if (!types.is_array() || static_cast<Index>(types.size()) != layers) {
    in.complain(key, "a list with a type for each of the " + std::to_string(layers) + " layers");
  }
  std::vector<bool> out;
  for (const ConfigReader::Json& type : types) {
    const std::string name = type.is_string() ? type.get<std::string>() : "";
    if (name != "sliding_attention" && name != "full_attention") {
      in.complain(key, "sliding_attention or full_attention for every layer");
    }
    out.push_back(name == "sliding_attention");
  }
  return out;
}

// The windows of the layers, whose attention is there already.
void parse_windows(const ConfigReader& in, const WindowDefaults& defaults, ModelConfig& out) {
  const bool said = in.json().contains("sliding_window");
  std::optional<Index> window = said || !defaults.window ? std::nullopt : defaults.window;
  // transformers writes 0 for Qwen2-MoE's where it is not used.
  if (in.flag_or("use_sliding_window", true) && in.has("sliding_window")) {
    window = in.size("sliding_window");
  }
  if (!in.flag_or("use_sliding_window", defaults.used)) {
    window.reset();
  }
  std::vector<bool> sliding(out.attention.size(), true);
  if (defaults.by_type && in.has("layer_types")) {
    sliding = sliding_of_types(in, out.num_hidden_layers);
    if (!window && std::find(sliding.begin(), sliding.end(), true) != sliding.end()) {
      in.complain("sliding_window", "the window of layers that slide by layer_types");
    }
  } else {
    const Index first = defaults.first_layer ? (in.has("max_window_layers") ? in.count("max_window_layers")
                                                                            : *defaults.first_layer)
                                             : 0;
    for (Index i = 0; i < out.num_hidden_layers; ++i) {
      sliding[static_cast<std::size_t>(i)] =
          i >= first && (defaults.full_every == 0 || (i + 1) % defaults.full_every != 0);
    }
  }
  for (std::size_t i = 0; i < sliding.size(); ++i) {
    out.attention[i].window = sliding[i] ? window : std::nullopt;
  }
}

// Scaled rope also scales the softmax (DeepseekV3Attention): mscale^2 with mscale = 0.1 mscale_all_dim
// ln(factor) + 1.
double yarn_scale(const ConfigReader& in) {
  const ConfigReader::Json found = rope_parameters_of(in.json(), in.path());
  const ConfigReader parameters(found, in.path(), "rope parameter ");
  if (rope_type_of(found, in.path()) == "default") {
    return 1;
  }
  const double all_dim = parameters.number_or("mscale_all_dim", 0);
  const double factor = parameters.number_or("factor", 1);
  const double mscale = 0.1 * all_dim * std::log(factor) + 1;
  return mscale * mscale;
}

}  // namespace

void parse_shared_keys(const ConfigReader& in, ModelConfig& out) {
  out.intermediate_size = in.size("intermediate_size");
  out.vocab_size = in.size("vocab_size");
  // Families of another activation name it in another key.
  if (out.activation == Activation::silu && in.has("hidden_act") && in.text("hidden_act") != "silu") {
    in.complain("hidden_act", "\"silu\"");
  }
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (in.has(key)) {
      const std::optional<DType> dtype = dtype_from_torch(in.text(key));
      if (!dtype) {
        in.complain(key, "bfloat16, float16 or float32");
      }
      out.dtype = *dtype;
      break;
    }
  }
  if (const ConfigReader::Json* quantised = in.find("quantization_config"); quantised != nullptr) {
    if (quantised->is_object() && quantised->value("quant_method", ConfigReader::Json()) == "fp8") {
      fail_input({in.path(), "", "quantization_config", "weights in bfloat16, float16 or float32",
                  "FP8 weights with scales (weight_scale_inv)",
                  "cast them to bfloat16 first, as DeepSeek's fp8_cast_bf16.py does, and remove this key"});
    }
    fail_input({in.path(), "", "quantization_config", "unquantised weights", "a quantised checkpoint",
                "convert the unquantised source and quantise the result"});
  }
}

void parse_body(const ConfigReader& in, ModelConfig& out) {
  parse_shared_keys(in, out);
  out.hidden_size = in.size("hidden_size");
  out.num_hidden_layers = in.size("num_hidden_layers");
  out.num_attention_heads = in.size("num_attention_heads");
  out.max_position_embeddings = in.size_or("max_position_embeddings", 2048);
  out.rms_norm_eps = in.number("rms_norm_eps");
  out.tie_word_embeddings = in.flag_or("tie_word_embeddings", false);
}

Index parse_head_dim(const ConfigReader& in, const ModelConfig& config, std::optional<Index> otherwise) {
  if (otherwise) {
    return in.size_or("head_dim", *otherwise);
  }
  if (!in.has("head_dim") && config.hidden_size % config.num_attention_heads != 0) {
    in.complain("head_dim", "a head size, since hidden_size is not a multiple of num_attention_heads");
  }
  return in.size_or("head_dim", config.hidden_size / config.num_attention_heads);
}

void refuse_flags(const ConfigReader& in, const std::vector<const char*>& keys, const std::string& model) {
  for (const char* key : keys) {
    if (in.flag_or(key, false)) {
      in.complain(key, "false, as every published " + model + " has it");
    }
  }
}

void check_key_value_heads(const ConfigReader& in, Index num_key_value_heads, Index num_attention_heads) {
  if (num_attention_heads % num_key_value_heads != 0) {
    in.complain("num_key_value_heads",
                "a divisor of num_attention_heads = " + std::to_string(num_attention_heads));
  }
}

void parse_grouped_query(const ConfigReader& in, const GroupedQueryDefaults& defaults, ModelConfig& out) {
  parse_body(in, out);
  GqaGeometry gqa;
  gqa.num_key_value_heads = in.size_or("num_key_value_heads", out.num_attention_heads);
  gqa.head_dim = parse_head_dim(in, out, defaults.head_dim);
  check_key_value_heads(in, gqa.num_key_value_heads, out.num_attention_heads);
  out.attention.assign(static_cast<std::size_t>(out.num_hidden_layers),
                       {.scale = 1.0F / std::sqrt(static_cast<float>(gqa.head_dim))});
  out.tie_word_embeddings = in.flag_or("tie_word_embeddings", defaults.tie_word_embeddings);
  parse_windows(in, defaults.windows, out);
  gqa.rotary_dim = gqa.head_dim;
  if (defaults.partial_rotary) {
    const auto& [factor, interleave] = *defaults.partial_rotary;
    gqa.rope_interleave = interleave;
    out.rotary = parse_partial_rotary(in.json(), gqa.head_dim, factor, in.path(), gqa.rotary_dim);
  } else {
    out.rotary = parse_rotary(in.json(), gqa.head_dim, in.path());
  }
  out.gqa = gqa;
}

void parse_multipliers(const ConfigReader& in, ModelConfig& out) {
  out.embedding_multiplier = in.number_or("embedding_multiplier", 1);
  out.residual_multiplier = in.number_or("residual_multiplier", 1);
  out.logits_scaling = in.number_or("logits_scaling", 1);
}

void set_still_layers(const std::vector<Index>& layers, ModelConfig& out) {
  if (layers.empty()) {
    return;
  }
  for (const Index i : layers) {
    out.attention[static_cast<std::size_t>(i)].rotary = static_cast<Index>(out.other_rotaries.size());
  }
  out.other_rotaries.push_back({.inv_freq = std::vector<float>(out.rotary.inv_freq.size(), 0.0F)});
}

std::vector<Index> parse_still_layers(const ConfigReader& in, Index num_hidden_layers) {
  constexpr const char* key = "no_rope_layers";
  const ConfigReader::Json& list = *in.find(key);
  if (!list.is_array() || static_cast<Index>(list.size()) < num_hidden_layers) {
    in.complain(key, "a list with 0 or 1 for each of the " + std::to_string(num_hidden_layers) + " layers");
  }
  std::vector<Index> out;
  for (Index i = 0; i < num_hidden_layers; ++i) {
    const ConfigReader::Json& said = list[static_cast<std::size_t>(i)];
    const std::int64_t rotates = said.is_number_integer() ? said.get<std::int64_t>() : -1;
    if (rotates != 0 && rotates != 1) {
      in.complain(key, "0 or 1 for every layer");
    }
    if (rotates == 0) {
      out.push_back(i);
    }
  }
  if (static_cast<Index>(out.size()) == num_hidden_layers) {
    in.complain(key, "1 for one layer at least, which rotates");
  }
  return out;
}

nlohmann::ordered_json with_rope_parameters(const ConfigReader& in,
                                            const nlohmann::ordered_json& parameters) {
  ConfigReader::Json out = in.json();
  out.erase("rope_scaling");
  out["rope_parameters"] = parameters;
  return out;
}

LatentGeometry parse_latent(const ConfigReader& in, ModelConfig& out) {
  LatentGeometry latent;
  latent.norm = LatentNorm::branch;
  latent.kv_lora_rank = in.size("kv_lora_rank");
  latent.qk_nope_head_dim = in.count("qk_nope_head_dim");
  latent.qk_rope_head_dim = in.size("qk_rope_head_dim");
  latent.v_head_dim = in.size("v_head_dim");
  if (in.has("q_lora_rank")) {
    latent.q_lora_rank = in.size("q_lora_rank");
  }
  latent.attention_bias = in.flag_or("attention_bias", false);
  latent.rope_interleave = in.flag_or("rope_interleave", true);
  set_latent_scale(latent, yarn_scale(in), out);
  return latent;
}

void set_latent_scale(const LatentGeometry& latent, double factor, ModelConfig& out) {
  const auto size = static_cast<double>(latent.qk_nope_head_dim + latent.qk_rope_head_dim);
  out.attention.assign(
      static_cast<std::size_t>(out.num_hidden_layers),
      {static_cast<float>(factor / std::sqrt(size)), std::nullopt, AttentionKind::latent, std::nullopt});
}

void even_branches(Index heads, Index groups, Index parts, LatentGeometry& latent) {
  const Index rank = latent.kv_lora_rank / (groups * parts);
  for (Index b = 0; b < groups * parts; ++b) {
    latent.branches.push_back({(b % groups) * (heads / groups), heads / groups, rank});
  }
  latent.norm = LatentNorm::branch;
}

std::optional<ExpertsGeometry> parse_experts(const ConfigReader& in, Index num_hidden_layers,
                                             const ExpertDefaults& defaults) {
  ExpertsGeometry out;
  out.first_layer = in.count("first_k_dense_replace");
  if (out.first_layer >= num_hidden_layers) {
    return std::nullopt;
  }
  if (in.size_or("moe_layer_freq", 1) != 1) {
    in.complain("moe_layer_freq", "1 (experts in every layer from first_k_dense_replace on)");
  }
  out.count = in.size("n_routed_experts");
  out.intermediate_size = in.size("moe_intermediate_size");
  out.shared_size = out.intermediate_size *
                    (defaults.shared_optional ? in.count("n_shared_experts") : in.size("n_shared_experts"));
  out.per_token = in.size("num_experts_per_tok");
  out.scale = in.number("routed_scaling_factor");
  out.topk_method = parse_topk_method(in, defaults);
  const bool sigmoid = out.topk_method == TopkMethod::noaux_tc;
  const std::string scores = sigmoid ? "sigmoid" : "softmax";
  if (in.has("scoring_func") && in.text("scoring_func") != scores) {
    in.complain("scoring_func",
                scores + ", as topk_method " + std::string(topk_method_name(out.topk_method)) + " has it");
  }
  out.normalised = in.flag_or("norm_topk_prob", defaults.normalised);
  if (out.topk_method != TopkMethod::greedy) {
    out.groups = in.size("n_group");
    out.groups_per_token = in.size("topk_group");
  }
  if (out.count % out.groups != 0) {
    in.complain("n_group", "a divisor of n_routed_experts = " + std::to_string(out.count));
  }
  const Index group_size = out.count / out.groups;
  if (sigmoid && group_size < 2) {
    in.complain("n_group", "groups of at least 2 of the " + std::to_string(out.count) + " experts");
  }
  if (out.groups_per_token > out.groups) {
    in.complain("topk_group", "at most n_group = " + std::to_string(out.groups));
  }
  check_experts_per_token(in, out);
  return out;
}

void check_experts_per_token(const ConfigReader& in, const ExpertsGeometry& experts) {
  const Index most = experts.groups_per_token * (experts.count / experts.groups);
  if (experts.per_token > most) {
    in.complain("num_experts_per_tok", "at most " + std::to_string(most) + ", the experts of " +
                                           (experts.groups == 1 ? "a layer" : "topk_group groups"));
  }
}

std::vector<Index> parse_layer_list(const ConfigReader& in, const char* key, Index first, Index last) {
  const ConfigReader::Json* found = in.find(key);
  if (found == nullptr) {
    return {};
  }
  const std::string wanted =
      "a list of layers from " + std::to_string(first) + " to " + std::to_string(last - 1);
  if (!found->is_array()) {
    in.complain(key, wanted);
  }
  std::set<Index> out;
  for (const ConfigReader::Json& entry : *found) {
    if (!entry.is_number_integer() || entry.get<Index>() < first || entry.get<Index>() >= last) {
      in.complain(key, wanted);
    }
    out.insert(entry.get<Index>());
  }
  return {out.begin(), out.end()};
}

std::optional<ExpertsGeometry> parse_qwen_experts(const ConfigReader& in, Index num_hidden_layers) {
  ExpertsGeometry out;
  const std::vector<Index> dense = parse_layer_list(in, "mlp_only_layers", 0, num_hidden_layers);
  const Index step = in.size_or("decoder_sparse_step", 1);
  const auto is_dense = [&](Index layer_idx) {
    return (layer_idx + 1) % step != 0 || std::binary_search(dense.begin(), dense.end(), layer_idx);
  };
  while (out.first_layer < num_hidden_layers && is_dense(out.first_layer)) {
    ++out.first_layer;
  }
  // transformers 5 writes Qwen3-MoE's number by Mixtral's name.
  const bool by_other_name = !in.has("num_experts") && in.has("num_local_experts");
  out.count = in.count(by_other_name ? "num_local_experts" : "num_experts");
  if (out.count == 0 || out.first_layer == num_hidden_layers) {
    return std::nullopt;
  }
  for (Index layer_idx = out.first_layer; layer_idx < num_hidden_layers; ++layer_idx) {
    if (is_dense(layer_idx)) {
      out.dense_layers.push_back(layer_idx);
    }
  }
  out.intermediate_size = in.size("moe_intermediate_size");
  out.per_token = in.size("num_experts_per_tok");
  out.normalised = in.flag_or("norm_topk_prob", false);
  check_softmax_router(in);
  check_experts_per_token(in, out);
  return out;
}

void check_softmax_router(const ConfigReader& in) {
  if (in.has("scoring_func") && in.text("scoring_func") != "softmax") {
    in.complain("scoring_func", "\"softmax\", or no such key");
  }
}

}  // namespace relatent
