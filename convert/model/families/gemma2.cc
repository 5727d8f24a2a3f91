// Gemma 2: sliding and full attention in turn, caps on scores and logits.
#include "convert/model/families/family.h"
#include "convert/model/families/gemma.h"

namespace relatent {
namespace {

void parse_gemma2(const ConfigReader& in, ModelConfig& out) {
  parse_gemma(in, {.full_every = 2, .attn_logit_softcapping = 50, .final_logit_softcapping = 30}, out);
}

}  // namespace

const Family& gemma2_family() {
  static const Family family = {
      .name = "gemma2",
      .model_type = "gemma2",
      .key = "",
      .parse = parse_gemma2,
      .rules = gemma_rules(),
      .models = "Gemma 2",
      .features = "every other layer slides; capped scores and logits; norms behind the blocks too; gelu"};
  return family;
}

}  // namespace relatent
