// Seed-OSS (ByteDance 2025): Llama's names, biases on queries, keys and values and nowhere else.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

void parse_seed_oss(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, out);
  if (!in.flag_or("attention_bias", true)) {
    in.complain("attention_bias", "true, as every published Seed-OSS model has it");
  }
  refuse_flags(in, {"attention_out_bias", "mlp_bias"}, "Seed-OSS model");
}

}  // namespace

const Family& seed_oss_family() {
  static const Family family = {.name = "seed_oss",
                                .model_type = "seed_oss",
                                .key = "",
                                .parse = parse_seed_oss,
                                .rules = rules::grouped_query(rules::required),
                                .models = "Seed-OSS",
                                .features = "biases on q, k, v"};
  return family;
}

}  // namespace relatent
