// SmolLM3 (Hugging Face 2025): every fourth layer without a rotary embedding.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

std::vector<Index> still_layers(const ConfigReader& in, Index num_hidden_layers) {
  if (in.has("no_rope_layers")) {
    return parse_still_layers(in, num_hidden_layers);
  }
  const Index interval = in.size_or("no_rope_layer_interval", 4);
  if (interval < 2) {
    in.complain("no_rope_layer_interval", "at least 2, so that some layers rotate");
  }
  std::vector<Index> out;
  for (Index i = interval - 1; i < num_hidden_layers; i += interval) {
    out.push_back(i);
  }
  return out;
}

void parse_smollm3(const ConfigReader& in, ModelConfig& out) {
  refuse_flags(in, {"use_sliding_window", "mlp_bias"}, "SmolLM3");
  parse_grouped_query(in, {.windows = {.used = false}, .tie_word_embeddings = true}, out);
  out.gqa->attention_bias = in.flag_or("attention_bias", false);
  set_still_layers(still_layers(in, out.num_hidden_layers), out);
}

}  // namespace

const Family& smollm3_family() {
  static const Family family = {.name = "smollm3",
                                .model_type = "smollm3",
                                .key = "",
                                .parse = parse_smollm3,
                                .rules = rules::grouped_query_by_config(),
                                .models = "SmolLM3",
                                .features = "every fourth layer without rotary embedding"};
  return family;
}

}  // namespace relatent
