// OLMo 2 (Ai2 2024): norms behind the blocks and not before them, and over all queries and all keys.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

void parse_olmo2(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, out);
  out.gqa->qk_norm = QkNorm::width;
  out.gqa->attention_bias = in.flag_or("attention_bias", false);
  out.norms = NormPlacement::behind;
}

}  // namespace

const Family& olmo2_family() {
  static const Family family = {
      .name = "olmo2",
      .model_type = "olmo2",
      .key = "",
      .parse = parse_olmo2,
      .rules = rules::with_norm_names(rules::grouped_query_by_config(),
                                      {.mlp_input = "model.layers.{i}.pre_feedforward_layernorm.weight",
                                       .attention_output = "model.layers.{i}.post_attention_layernorm.weight",
                                       .mlp_output = "model.layers.{i}.post_feedforward_layernorm.weight"}),
      .models = "OLMo 2",
      .features = "norms behind the blocks only; norms over all queries and all keys"};
  return family;
}

}  // namespace relatent
