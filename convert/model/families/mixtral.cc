// Mixtral (Mistral AI 2023): every MLP a mixture. The weights of a token's experts are the softmax over all
// of them, divided by the sum of those chosen (MixtralTopKRouter in transformers).
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

constexpr rules::ExpertNames names = {.router = "model.layers.{i}.block_sparse_moe.gate.weight",
                                      .gate = "model.layers.{i}.block_sparse_moe.experts.{b}.w1.weight",
                                      .up = "model.layers.{i}.block_sparse_moe.experts.{b}.w3.weight",
                                      .down = "model.layers.{i}.block_sparse_moe.experts.{b}.w2.weight"};

void parse_mixtral(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, out);
  ExpertsGeometry experts;
  experts.count = in.size("num_local_experts");
  experts.intermediate_size = out.intermediate_size;
  experts.per_token = in.size("num_experts_per_tok");
  experts.normalised = true;
  check_softmax_router(in);
  check_experts_per_token(in, experts);
  out.experts = experts;
}

}  // namespace

const Family& mixtral_family() {
  static const Family family = {.name = "mixtral",
                                .model_type = "mixtral",
                                .key = "",
                                .parse = parse_mixtral,
                                .rules = rules::with_experts(rules::grouped_query(nullptr), names),
                                .models = "Mixtral 8x7B, 8x22B",
                                .features = "experts; sliding window"};
  return family;
}

}  // namespace relatent
