// Qwen3: every head's queries and keys are normalised before they are rotated.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

void parse_qwen3(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, {.head_dim = 128, .windows = qwen_windows}, out);
  out.gqa->qk_norm = QkNorm::head;
  out.gqa->attention_bias = in.flag_or("attention_bias", false);
}

}  // namespace

const Family& qwen3_family() {
  static const Family family = {.name = "qwen3",
                                .model_type = "qwen3",
                                .key = "",
                                .parse = parse_qwen3,
                                .rules = rules::grouped_query_by_config(),
                                .models = "Qwen3 (dense)",
                                .features = "norms on every head's queries and keys; windows by layer"};
  return family;
}

}  // namespace relatent
