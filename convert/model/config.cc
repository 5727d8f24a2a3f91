#include "convert/model/config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "convert/model/families.h"
#include "formats/error.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

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

MlaGeometry parse_mla(const Reader& in, const Json& config, const std::filesystem::path& path) {
  MlaGeometry mla;
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

}  // namespace

Index ModelConfig::cache_numbers() const {
  return gqa ? 2 * gqa->num_key_value_heads * gqa->head_dim : mla->kv_lora_rank + mla->qk_rope_head_dim;
}

Index ModelConfig::cache_bytes_per_token_on_device(Index tp) const {
  if (!gqa) {
    return cache_bytes_per_token();
  }
  const Index heads_here = std::max<Index>(1, (gqa->num_key_value_heads + tp - 1) / tp);
  return cache_bytes_per_token() / gqa->num_key_value_heads * heads_here;
}

ModelConfig parse_config(const Json& config, const std::filesystem::path& config_path) {
  const Reader in(config, config_path);
  ModelConfig out;
  out.model_type = in.text("model_type");
  const Family* family = find_family(out.model_type);
  if (family == nullptr) {
    fail_input(
        {config_path, "", "model_type", "one of " + known_model_types(), "\"" + out.model_type + "\"", ""});
  }
  out.hidden_size = in.size("hidden_size");
  out.num_hidden_layers = in.size("num_hidden_layers");
  out.num_attention_heads = in.size("num_attention_heads");
  out.intermediate_size = in.size("intermediate_size");
  out.vocab_size = in.size("vocab_size");
  out.max_position_embeddings = in.size_or("max_position_embeddings", 2048);
  out.rms_norm_eps = in.number("rms_norm_eps");
  out.tie_word_embeddings = in.flag_or("tie_word_embeddings", false);
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
  if (in.find("quantization_config") != nullptr) {
    fail_input({config_path, "", "quantization_config", "unquantised weights", "a quantised checkpoint",
                "convert the unquantised source and quantise the result"});
  }
  if (family->latent) {
    out.mla = parse_mla(in, config, config_path);
    const Index dense = in.find("first_k_dense_replace") == nullptr ? 0 : in.count("first_k_dense_replace");
    if (dense < out.num_hidden_layers) {
      fail_input(
          {config_path, "", "first_k_dense_replace",
           "at least num_hidden_layers = " + std::to_string(out.num_hidden_layers) + " (dense layers only)",
           std::to_string(dense), ""});
    }
    out.rotary = parse_rotary(config, out.mla->qk_rope_head_dim, config_path);
  } else {
    GqaGeometry gqa;
    gqa.num_key_value_heads = in.size_or("num_key_value_heads", out.num_attention_heads);
    if (in.find("head_dim") == nullptr && out.hidden_size % out.num_attention_heads != 0) {
      in.complain("head_dim", "a head size, since hidden_size is not a multiple of num_attention_heads");
    }
    gqa.head_dim = in.size_or("head_dim", out.hidden_size / out.num_attention_heads);
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
