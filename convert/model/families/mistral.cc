// Mistral 7B: no biases, and a sliding window in every layer: of 4096 positions, unless the config says null
// as later versions do.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

void parse_mistral(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, {.windows = {.window = 4096}}, out);
}

}  // namespace

const Family& mistral_family() {
  static const Family family = {.name = "mistral",
                                .model_type = "mistral",
                                .key = "",
                                .parse = parse_mistral,
                                .rules = rules::grouped_query(nullptr),
                                .models = "Mistral 7B, Ministral",
                                .features = "sliding window"};
  return family;
}

}  // namespace relatent
