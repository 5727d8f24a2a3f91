// GLM-4 (Zhipu 2025): half of every head rotates, in pairs side by side; norms before and behind the blocks;
// gate and up in one tensor; biases on queries, keys and values.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

void parse_glm4(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(
      in, {.head_dim = 128, .partial_rotary = PartialRotary{.factor = 0.5, .interleave = true}}, out);
  out.gqa->attention_bias = in.flag_or("attention_bias", true);
  out.norms = NormPlacement::both;
}

}  // namespace

const Family& glm4_family() {
  static const Family family = {
      .name = "glm4",
      .model_type = "glm4",
      .key = "",
      .parse = parse_glm4,
      .rules = rules::with_norm_names(rules::grouped_query(rules::with_gqa_bias),
                                      {.mlp_input = "model.layers.{i}.post_attention_layernorm.weight",
                                       .attention_output = "model.layers.{i}.post_self_attn_layernorm.weight",
                                       .mlp_output = "model.layers.{i}.post_mlp_layernorm.weight"}),
      .fused = {rules::fused_gate_and_up()},
      .models = "GLM-4-0414, GLM-Z1",
      .features =
          "half of each head rotates, in interleaved pairs; norms behind the blocks too; biases on q, "
          "k, v; gate and up in one tensor"};
  return family;
}

}  // namespace relatent
