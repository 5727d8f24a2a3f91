// Phi-3 and Phi-4 (Microsoft 2024): queries, keys and values in one tensor, gate and up in another; heads may
// rotate in part. No biases.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

Index query_rows(const ModelConfig& c) {
  return c.num_attention_heads * c.gqa->head_dim;
}

Index key_rows(const ModelConfig& c) {
  return c.gqa->num_key_value_heads * c.gqa->head_dim;
}

void parse_phi3(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, {.partial_rotary = PartialRotary{}}, out);
  if (out.rotary.rope_type != "default" && out.rotary.rope_type != "longrope") {
    in.complain(in.has("rope_scaling") ? "rope_scaling" : "rope_parameters",
                "of type default or longrope, as every Phi-3 model has it");
  }
}

}  // namespace

const Family& phi3_family() {
  static const Family family = {
      .name = "phi3",
      .model_type = "phi3",
      .key = "",
      .parse = parse_phi3,
      .rules = rules::grouped_query(nullptr),
      .fused = {{"model.layers.{i}.self_attn.qkv_proj.weight",
                 {{"model.layers.{i}.self_attn.q_proj.weight", query_rows},
                  {"model.layers.{i}.self_attn.k_proj.weight", key_rows},
                  {"model.layers.{i}.self_attn.v_proj.weight", key_rows}}},
                rules::fused_gate_and_up()},
      .models = "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
      .features = "q, k, v in one tensor, gate and up too; partial rotary embedding; `longrope`"};
  return family;
}

}  // namespace relatent
