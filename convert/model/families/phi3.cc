// Phi-3 and Phi-4 (Microsoft 2024): queries, keys and values in one tensor, gate and up in another; heads may
// rotate in part. No biases.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

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
      .fused = {rules::fused_queries_keys_and_values(), rules::fused_gate_and_up()},
      .models = "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
      .features = "q, k, v in one tensor, gate and up too; partial rotary embedding; `longrope`"};
  return family;
}

}  // namespace relatent
