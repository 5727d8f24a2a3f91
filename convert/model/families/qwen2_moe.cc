// Qwen1.5-MoE and Qwen2-57B-A14B: Qwen2's attention, experts with softmax scores, which norm_topk_prob
// divides by the sum of those chosen, and one shared expert, which the sigmoid of shared_expert_gate weighs
// (Qwen2MoeSparseMoeBlock in transformers).
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

constexpr rules::ExpertNames names = {.shared_gate = "model.layers.{i}.mlp.shared_expert.gate_proj.weight",
                                      .shared_up = "model.layers.{i}.mlp.shared_expert.up_proj.weight",
                                      .shared_down = "model.layers.{i}.mlp.shared_expert.down_proj.weight"};

void parse_qwen2_moe(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, {.windows = {.used = false}}, out);
  if (!in.flag_or("qkv_bias", true)) {
    in.complain("qkv_bias", "true, as every published Qwen2-MoE model has it");
  }
  // Which layers slide is another rule than Qwen2's (Qwen2MoeConfig.layer_types).
  if (in.flag_or("use_sliding_window", false)) {
    in.complain("use_sliding_window", "false, as every published Qwen2-MoE model has it");
  }
  out.experts = parse_qwen_experts(in, out.num_hidden_layers);
  if (out.experts) {
    out.experts->shared_size = in.size("shared_expert_intermediate_size");
    out.experts->shared_gate = true;
  }
}

}  // namespace

const Family& qwen2_moe_family() {
  static const Family family = {.name = "qwen2_moe",
                                .model_type = "qwen2_moe",
                                .key = "",
                                .parse = parse_qwen2_moe,
                                .rules = rules::with_experts(rules::grouped_query(rules::required), names),
                                .models = "Qwen1.5-MoE, Qwen2-57B-A14B",
                                .features = "experts with a gated shared one; biases on q, k, v"};
  return family;
}

}  // namespace relatent
