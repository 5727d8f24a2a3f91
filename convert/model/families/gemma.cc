#include "convert/model/families/gemma.h"

#include <cmath>

#include "convert/model/families/rules.h"

namespace relatent {
namespace {

std::optional<double> parse_cap(const ConfigReader& in, const char* key, std::optional<double> absent) {
  if (in.has(key)) {
    return in.number(key);
  }
  return in.json().contains(key) ? std::nullopt : absent;
}

}  // namespace

void parse_gemma(const ConfigReader& in, const GemmaDefaults& defaults, ModelConfig& out) {
  const std::string activation(activation_name(Activation::gelu_tanh));
  if (in.has("hidden_activation") && in.text("hidden_activation") != activation) {
    in.complain("hidden_activation", "\"" + activation + "\"");
  }
  out.activation = Activation::gelu_tanh;
  refuse_flags(in, {"attention_bias", "use_bidirectional_attention"}, "Gemma");
  parse_grouped_query(in,
                      {.windows = {.window = 4096, .by_type = true, .full_every = defaults.full_every},
                       .tie_word_embeddings = true},
                      out);
  if (!in.has("head_dim")) {
    in.complain("head_dim", "a head size, which does not follow from hidden_size");
  }
  out.norms = NormPlacement::both;
  out.norm_unit_offset = true;
  out.embedding_multiplier = std::sqrt(static_cast<double>(out.hidden_size));
  out.attn_logit_softcapping = parse_cap(in, "attn_logit_softcapping", defaults.attn_logit_softcapping);
  out.final_logit_softcapping = parse_cap(in, "final_logit_softcapping", defaults.final_logit_softcapping);
  const auto scale = static_cast<float>(1 / std::sqrt(in.number_or("query_pre_attn_scalar", 256)));
  for (AttentionSpec& spec : out.attention) {
    spec.scale = scale;
  }
}

std::vector<TensorRule> gemma_rules() {
  return rules::with_norm_names(rules::grouped_query(nullptr),
                                {.mlp_input = "model.layers.{i}.pre_feedforward_layernorm.weight",
                                 .attention_output = "model.layers.{i}.post_attention_layernorm.weight",
                                 .mlp_output = "model.layers.{i}.post_feedforward_layernorm.weight"});
}

}  // namespace relatent
