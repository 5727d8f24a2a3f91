#include "convert/model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "convert/model/devices.h"
#include "convert/model/families.h"
#include "formats/error.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

struct NamedNorm {
  LatentNorm norm;
  std::string_view name;
};
constexpr std::array<NamedNorm, 3> norms = {
    {{LatentNorm::none, "none"}, {LatentNorm::branch, "branch"}, {LatentNorm::replicated, "replicated"}}};

class Reader {
 public:
  Reader(const Json& config, const std::filesystem::path& path) : config_(config), path_(path) {}

  const Json* find(const char* key) const {
    const auto it = config_.find(key);
    return it == config_.end() || it->is_null() ? nullptr : &*it;
  }
  Index size(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || !value->is_number_integer() || value->get<std::int64_t>() <= 0 ||
        value->get<std::int64_t>() > max_size) {
      complain(key, "a positive whole number");
    }
    return value->get<Index>();
  }
  Index size_or(const char* key, Index fallback) const { return find(key) == nullptr ? fallback : size(key); }
  // Like size, but zero is a size too.
  Index count(const char* key) const {
    const Json* value = find(key);
    return value != nullptr && value->is_number_integer() && value->get<std::int64_t>() == 0 ? 0 : size(key);
  }
  double number(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || !value->is_number() || !std::isfinite(value->get<double>())) {
      complain(key, "a number");
    }
    return value->get<double>();
  }
  bool flag_or(const char* key, bool fallback) const {
    const Json* value = find(key);
    if (value == nullptr) {
      return fallback;
    }
    if (!value->is_boolean()) {
      complain(key, "true or false");
    }
    return value->get<bool>();
  }
  std::string text(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr || !value->is_string()) {
      complain(key, "a string");
    }
    return value->get<std::string>();
  }
  [[noreturn]] void complain(const char* key, const std::string& expected) const {
    const auto it = config_.find(key);
    fail_input({path_, "", key, expected, it == config_.end() ? "nothing" : it->dump(), ""});
  }

 private:
  // Beyond any real model, and small enough that products of three sizes fit 64 bits.
  static constexpr std::int64_t max_size = 1 << 20;
  const Json& config_;
  const std::filesystem::path& path_;
};

std::optional<Index> parse_sliding_window(const Reader& in) {
  if (in.find("sliding_window") == nullptr || !in.flag_or("use_sliding_window", true)) {
    return std::nullopt;
  }
  return in.size("sliding_window");
}

// The keys that every latent family shares.
LatentGeometry parse_latent(const Reader& in, const Json& config, const std::filesystem::path& path) {
  LatentGeometry mla;
  mla.kv_lora_rank = in.size("kv_lora_rank");
  mla.qk_nope_head_dim = in.count("qk_nope_head_dim");
  mla.qk_rope_head_dim = in.size("qk_rope_head_dim");
  mla.v_head_dim = in.size("v_head_dim");
  if (in.find("q_lora_rank") != nullptr) {
    mla.q_lora_rank = in.size("q_lora_rank");
  }
  mla.attention_bias = in.flag_or("attention_bias", false);
  mla.rope_interleave = in.flag_or("rope_interleave", true);
  // Scaled rope also scales the softmax (DeepseekV3Attention): mscale^2 with mscale = 0.1 mscale_all_dim
  // ln(factor) + 1.
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const auto rope = config.find(key);
    if (rope == config.end() || !rope->is_object()) {
      continue;
    }
    const Reader parameters(*rope, path);
    const char* type_key = parameters.find("rope_type") != nullptr ? "rope_type" : "type";
    const bool plain = parameters.find(type_key) == nullptr || parameters.text(type_key) == "default";
    const double all_dim =
        parameters.find("mscale_all_dim") != nullptr ? parameters.number("mscale_all_dim") : 0;
    const double factor = parameters.find("factor") != nullptr ? parameters.number("factor") : 1;
    if (!plain && all_dim != 0 && factor > 1) {
      const double mscale = 0.1 * all_dim * std::log(factor) + 1;
      mla.scale_factor = mscale * mscale;
    }
    break;
  }
  return mla;
}

constexpr std::array<std::pair<TopkMethod, std::string_view>, 3> topk_methods = {
    {{TopkMethod::greedy, "greedy"},
     {TopkMethod::group_limited_greedy, "group_limited_greedy"},
     {TopkMethod::noaux_tc, "noaux_tc"}}};

// DeepSeek-V2 knows the first two methods and V3 the last; V3's configs often leave it out.
TopkMethod parse_topk_method(const Reader& in, const std::string& model_type) {
  const auto may_be = [&](TopkMethod method) {
    return model_type == "relatent" || (method == TopkMethod::noaux_tc) == (model_type == "deepseek_v3");
  };
  if (in.find("topk_method") == nullptr && model_type != "relatent") {
    return model_type == "deepseek_v3" ? TopkMethod::noaux_tc : TopkMethod::greedy;
  }
  const std::string found = in.text("topk_method");
  std::string allowed;
  for (const auto& [method, name] : topk_methods) {
    if (may_be(method)) {
      if (found == name) {
        return method;
      }
      allowed += (allowed.empty() ? "" : " or ") + std::string(name);
    }
  }
  in.complain("topk_method", allowed);
}

// DeepSeek-V2 and V3 have experts unless first_k_dense_replace covers all layers; what we write says so only
// where there are some.
std::optional<ExpertsGeometry> parse_experts(const Reader& in, const ModelConfig& config) {
  if (config.model_type == "relatent" && in.find("first_k_dense_replace") == nullptr) {
    return std::nullopt;
  }
  ExpertsGeometry out;
  out.first_layer = in.count("first_k_dense_replace");
  if (out.first_layer >= config.num_hidden_layers) {
    return std::nullopt;
  }
  if (in.size_or("moe_layer_freq", 1) != 1) {
    in.complain("moe_layer_freq", "1 (experts in every layer from first_k_dense_replace on)");
  }
  out.count = in.size("n_routed_experts");
  out.shared = in.size("n_shared_experts");
  out.intermediate_size = in.size("moe_intermediate_size");
  out.per_token = in.size("num_experts_per_tok");
  out.scale = in.number("routed_scaling_factor");
  out.topk_method = parse_topk_method(in, config.model_type);
  const bool sigmoid = out.topk_method == TopkMethod::noaux_tc;
  const std::string scores = sigmoid ? "sigmoid" : "softmax";
  if (in.find("scoring_func") != nullptr && in.text("scoring_func") != scores) {
    in.complain("scoring_func",
                scores + ", as topk_method " + std::string(topk_method_name(out.topk_method)) + " has it");
  }
  out.normalised = in.flag_or("norm_topk_prob", config.model_type == "deepseek_v3");
  if (out.normalised && config.model_type == "deepseek_v2") {
    in.complain("norm_topk_prob", "false (what runs deepseek_v2 disagrees about true)");
  }
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
  if (out.per_token > out.groups_per_token * group_size) {
    in.complain("num_experts_per_tok", "at most " + std::to_string(out.groups_per_token * group_size) +
                                           ", the experts of " +
                                           (out.groups == 1 ? "a layer" : "topk_group groups"));
  }
  return out;
}

// DeepSeek's MLA: one latent that all heads read, normalised.
void one_branch(const ModelConfig& config, LatentGeometry& latent) {
  latent.branches = {{0, config.num_attention_heads, latent.kv_lora_rank, -1}};
  latent.norm = LatentNorm::branch;
}

// Equal latents: of `parts` branches for every of `groups` groups of heads, numbered group by group.
void even_branches(Index heads, Index groups, Index parts, LatentGeometry& latent) {
  const Index rank = latent.kv_lora_rank / (groups * parts);
  for (Index b = 0; b < groups * parts; ++b) {
    latent.branches.push_back({(b % groups) * (heads / groups), heads / groups, rank, -1});
  }
  latent.norm = LatentNorm::branch;
}

// A model of the MLRA authors (engines/mlra.h): GPT-2's names for the sizes, everything else fixed in code.
void parse_mlra(const Reader& in, const std::filesystem::path& path, ModelConfig& out) {
  out.hidden_size = in.size("n_embd");
  out.num_hidden_layers = in.size("n_layer");
  out.num_attention_heads = in.size("n_head");
  out.max_position_embeddings = in.size_or("block_size", 1024);
  out.rms_norm_eps = 1e-6;
  out.tie_word_embeddings = true;
  LatentGeometry latent;
  const std::string model = in.text("mlra_model");
  const bool mlra = model == "mlra_2" || model == "mlra_4";
  if (!mlra && model != "gla_2" && model != "gla_4") {
    in.complain("mlra_model", "mlra_2, mlra_4, gla_2 or gla_4");
  }
  const Index count = model.back() - '0';
  latent.form = mlra ? "mlra" : "gla";
  latent.kv_lora_rank = in.size("kv_lora_rank");
  latent.qk_nope_head_dim = in.size("qk_nope_head_dim");
  latent.qk_rope_head_dim = in.size("qk_rope_head_dim");
  latent.v_head_dim = latent.qk_nope_head_dim;
  latent.q_lora_rank = in.size("q_lora_rank");
  latent.rope_interleave = false;
  const Index latents = model == "gla_2" ? 2 : 4;
  const Index parts = mlra ? count : 1;
  if (latent.kv_lora_rank % latents != 0) {
    in.complain("kv_lora_rank", "a multiple of " + std::to_string(latents));
  }
  if (out.num_attention_heads % (latents / parts) != 0) {
    in.complain("n_head", "a multiple of " + std::to_string(latents / parts));
  }
  even_branches(out.num_attention_heads, latents / parts, parts, latent);
  const auto hidden = static_cast<double>(out.hidden_size);
  latent.latent_scale = std::sqrt(hidden / static_cast<double>(latent.kv_lora_rank / latents));
  latent.branch_scale = mlra ? 1 / std::sqrt(static_cast<double>(count)) : 1;
  latent.query_scale = std::sqrt(hidden / static_cast<double>(*latent.q_lora_rank));
  out.rotary = parse_rotary({{"rope_theta", 10000.0}}, latent.qk_rope_head_dim, path);
  out.latent = std::move(latent);
}

Index parse_head_dim(const Reader& in, const ModelConfig& config) {
  if (in.find("head_dim") == nullptr && config.hidden_size % config.num_attention_heads != 0) {
    in.complain("head_dim", "a head size, since hidden_size is not a multiple of num_attention_heads");
  }
  return in.size_or("head_dim", config.hidden_size / config.num_attention_heads);
}

// The GLA authors' module (engines/gla.h): a Llama with sizes fixed by its head size.
void parse_gla(const Reader& in, const Json& config, const std::filesystem::path& path, ModelConfig& out) {
  LatentGeometry latent;
  latent.form = "gla";
  latent.qk_nope_head_dim = parse_head_dim(in, out);
  latent.v_head_dim = latent.qk_nope_head_dim;
  latent.qk_rope_head_dim = in.size("qk_rope_dim");
  latent.kv_lora_rank = 4 * latent.qk_nope_head_dim;
  latent.q_lora_rank = 8 * latent.qk_nope_head_dim;
  latent.attention_bias = in.flag_or("attention_bias", false);
  latent.rope_interleave = false;
  latent.norm_eps = out.rms_norm_eps;
  if (out.num_attention_heads % 2 != 0) {
    in.complain("num_attention_heads", "an even number");
  }
  even_branches(out.num_attention_heads, 2, 1, latent);
  out.rotary = parse_rotary(config, latent.qk_rope_head_dim, path);
  out.latent = std::move(latent);
}

// The branches of a relatent model (engines/relatent.h writes them).
void parse_branches(const Reader& in, Index heads, const std::filesystem::path& path,
                    LatentGeometry& latent) {
  // What a later layout may say, and this reader would get wrong.
  if (in.size_or("layout_version", 1) != 1) {
    in.complain("layout_version", "1, the layout that this version reads");
  }
  if (in.find("latent_features") != nullptr && in.text("latent_features") != "hidden") {
    in.complain("latent_features", "\"hidden\": latents that read the layer's normalised input");
  }
  if (in.find("layers") != nullptr) {
    in.complain("layers", "nothing: all layers alike");
  }
  latent.form = in.text("latent_form");
  latent.rope_interleave = false;
  const std::string norm_text = in.text("latent_norm");
  const auto* norm = std::find_if(norms.begin(), norms.end(),
                                  [&](const NamedNorm& known) { return known.name == norm_text; });
  if (norm == norms.end()) {
    in.complain("latent_norm", "none, branch or replicated");
  }
  latent.norm = norm->norm;
  latent.norm_rank = latent.norm == LatentNorm::replicated ? in.size("latent_norm_rank") : 0;
  Index total = 0;
  const Json* shared = in.find("latent_shared_ranks");
  if (shared == nullptr || !shared->is_array()) {
    in.complain("latent_shared_ranks", "a list of whole numbers");
  }
  for (const Json& rank : *shared) {
    if (!rank.is_number_integer() || rank.get<Index>() <= 0 || rank.get<Index>() > (1 << 20)) {
      in.complain("latent_shared_ranks", "a list of positive whole numbers");
    }
    latent.shared_ranks.push_back(rank.get<Index>());
    total += latent.shared_ranks.back();
  }
  const Json* branches = in.find("latent_branches");
  if (branches == nullptr || !branches->is_array() || branches->empty() || branches->size() > 1024) {
    in.complain("latent_branches", "a list of latents");
  }
  std::vector<bool> read(static_cast<std::size_t>(heads), false);
  for (const Json& entry : *branches) {
    if (!entry.is_object()) {
      in.complain("latent_branches", "a list of objects");
    }
    const Reader branch(entry, path);
    BranchGeometry out;
    out.first_head = branch.count("first_head");
    out.head_count = branch.size("num_heads");
    out.rank = branch.size("rank");
    out.shared = branch.find("shared") == nullptr ? -1 : branch.count("shared");
    if (out.first_head + out.head_count > heads) {
      in.complain("latent_branches", "heads below num_attention_heads = " + std::to_string(heads));
    }
    if (out.shared >= static_cast<Index>(latent.shared_ranks.size())) {
      in.complain("latent_branches", "\"shared\" below the length of latent_shared_ranks");
    }
    std::fill_n(read.begin() + out.first_head, out.head_count, true);
    total += out.rank;
    latent.branches.push_back(out);
  }
  if (std::find(read.begin(), read.end(), false) != read.end()) {
    in.complain("latent_branches", "a latent for every head");
  }
  if (total != latent.kv_lora_rank) {
    fail_input({path, "", "kv_lora_rank", std::to_string(total) + ", the sum over latents",
                std::to_string(latent.kv_lora_rank), ""});
  }
  const auto reaches = [&](const BranchGeometry& a, const BranchGeometry& b) {
    return a.first_head == b.first_head && a.head_count == b.head_count;
  };
  for (const BranchGeometry& a : latent.branches) {
    for (const BranchGeometry& b : latent.branches) {
      if (a.shared >= 0 && a.shared == b.shared && !reaches(a, b)) {
        in.complain("latent_branches", "latents that share coordinates to serve the same heads");
      }
    }
  }
}

}  // namespace

std::string_view norm_name(LatentNorm norm) {
  const auto* known =
      std::find_if(norms.begin(), norms.end(), [&](const NamedNorm& named) { return named.norm == norm; });
  return known == norms.end() ? "" : known->name;
}

std::string_view topk_method_name(TopkMethod method) {
  for (const auto& [known, name] : topk_methods) {
    if (known == method) {
      return name;
    }
  }
  return "";
}

Index ModelConfig::cache_numbers() const {
  return gqa ? 2 * gqa->num_key_value_heads * gqa->head_dim : latent->kv_lora_rank + latent->qk_rope_head_dim;
}

std::optional<Index> ModelConfig::cache_bytes_per_token_on_device(Index tp) const {
  const Index unit = num_hidden_layers * static_cast<Index>(size_of(dtype));
  if (gqa) {
    const Index heads_here = std::max<Index>(1, (gqa->num_key_value_heads + tp - 1) / tp);
    return 2 * heads_here * gqa->head_dim * unit;
  }
  if (!why_not_shared(*latent, tp).empty()) {
    return std::nullopt;
  }
  Index most = 0;
  for (const DeviceShare& share : device_shares(*latent, tp)) {
    most = std::max(most, share.cache_numbers(*latent));
  }
  return most * unit;
}

ModelConfig parse_config(const Json& config, const std::filesystem::path& config_path) {
  const Reader in(config, config_path);
  ModelConfig out;
  out.model_type = in.text("model_type");
  const bool mlra = out.model_type == "gpt2" && in.find("mlra_model") != nullptr;
  const bool gla = out.model_type == "llama" && in.find("qk_rope_dim") != nullptr;
  if (mlra || gla) {
    out.model_type = mlra ? mlra_type : gla_type;
  }
  const Family* family = find_family(out.model_type);
  if (family == nullptr) {
    fail_input(
        {config_path, "", "model_type", "one of " + known_model_types(), "\"" + out.model_type + "\"", ""});
  }
  out.intermediate_size = in.size("intermediate_size");
  out.vocab_size = in.size("vocab_size");
  if (mlra) {
    parse_mlra(in, config_path, out);
  } else {
    out.hidden_size = in.size("hidden_size");
    out.num_hidden_layers = in.size("num_hidden_layers");
    out.num_attention_heads = in.size("num_attention_heads");
    out.max_position_embeddings = in.size_or("max_position_embeddings", 2048);
    out.rms_norm_eps = in.number("rms_norm_eps");
    out.tie_word_embeddings = in.flag_or("tie_word_embeddings", false);
  }
  if (in.find("hidden_act") != nullptr && in.text("hidden_act") != "silu") {
    in.complain("hidden_act", "\"silu\"");
  }
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (in.find(key) != nullptr) {
      const std::optional<DType> dtype = dtype_from_torch(in.text(key));
      if (!dtype) {
        in.complain(key, "bfloat16, float16 or float32");
      }
      out.dtype = *dtype;
      break;
    }
  }
  if (const Json* quantised = in.find("quantization_config"); quantised != nullptr) {
    if (quantised->is_object() && quantised->value("quant_method", Json()) == "fp8") {
      fail_input({config_path, "", "quantization_config", "weights in bfloat16, float16 or float32",
                  "FP8 weights with scales (weight_scale_inv)",
                  "cast them to bfloat16 first, as DeepSeek's fp8_cast_bf16.py does, and remove this key"});
    }
    fail_input({config_path, "", "quantization_config", "unquantised weights", "a quantised checkpoint",
                "convert the unquantised source and quantise the result"});
  }
  if (mlra) {
    return out;
  }
  if (gla) {
    parse_gla(in, config, config_path, out);
    return out;
  }
  if (family->latent) {
    out.latent = parse_latent(in, config, config_path);
    if (out.model_type == "relatent") {
      parse_branches(in, out.num_attention_heads, config_path, *out.latent);
    } else {
      one_branch(out, *out.latent);
    }
    // DeepSeek-V2 has no such key, and pairs only.
    out.latent->rope_interleave = out.latent->rope_interleave || out.model_type == "deepseek_v2";
    out.experts = parse_experts(in, out);
    if (out.model_type == "deepseek_v3") {
      for (const char* key : {"num_nextn_predict_layers", "num_mtp_layers"}) {
        if (out.prediction_layers == 0 && in.find(key) != nullptr) {
          out.prediction_layers = in.count(key);
        }
      }
    }
    out.rotary = parse_rotary(config, out.latent->qk_rope_head_dim, config_path);
  } else {
    GqaGeometry gqa;
    gqa.num_key_value_heads = in.size_or("num_key_value_heads", out.num_attention_heads);
    gqa.head_dim = parse_head_dim(in, out);
    if (out.num_attention_heads % gqa.num_key_value_heads != 0) {
      in.complain("num_key_value_heads",
                  "a divisor of num_attention_heads = " + std::to_string(out.num_attention_heads));
    }
    out.gqa = gqa;
    out.sliding_window = parse_sliding_window(in);
    out.rotary = parse_rotary(config, gqa.head_dim, config_path);
  }
  return out;
}

}  // namespace relatent
