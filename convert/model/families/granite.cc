// Granite 3 (IBM 2024): Llama with constants on embeddings, scores, what layers add, and logits.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

void parse_granite(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, out);
  parse_multipliers(in, out);
  refuse_flags(in, {"mlp_bias"}, "Granite model");
  out.gqa->attention_bias = in.flag_or("attention_bias", false);
  const auto scale = static_cast<float>(in.number_or("attention_multiplier", 1));
  for (AttentionSpec& layer : out.attention) {
    layer.scale = scale;
  }
}

}  // namespace

const Family& granite_family() {
  static const Family family = {.name = "granite",
                                .model_type = "granite",
                                .key = "",
                                .parse = parse_granite,
                                .rules = rules::grouped_query_by_config(),
                                .models = "Granite 3 (dense)",
                                .features = "multipliers of embeddings, scores, residuals and logits"};
  return family;
}

}  // namespace relatent
