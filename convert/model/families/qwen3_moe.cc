// Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3's attention, experts with softmax scores, which
// norm_topk_prob divides by the sum of those chosen, and none shared (Qwen3MoeSparseMoeBlock in
// transformers).
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

void parse_qwen3_moe(const ConfigReader& in, ModelConfig& out) {
  // Where windows are used, every layer has one.
  parse_grouped_query(in, {.windows = {.window = qwen_windows.window, .used = false}}, out);
  out.gqa->qk_norm = QkNorm::head;
  out.gqa->attention_bias = in.flag_or("attention_bias", false);
  out.experts = parse_qwen_experts(in, out.num_hidden_layers);
}

}  // namespace

const Family& qwen3_moe_family() {
  static const Family family = {.name = "qwen3_moe",
                                .model_type = "qwen3_moe",
                                .key = "",
                                .parse = parse_qwen3_moe,
                                .rules = rules::with_experts(rules::grouped_query_by_config()),
                                .models = "Qwen3-30B-A3B, 235B-A22B",
                                .features = "experts; norms on every head's queries and keys"};
  return family;
}

}  // namespace relatent
