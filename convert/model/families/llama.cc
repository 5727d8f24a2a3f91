// Llama 2 and 3, and what else says `llama`: SmolLM2, Yi, Vicuna. Any projection may have a bias.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {

const Family& llama_family() {
  static const Family family = {.name = "llama",
                                .model_type = "llama",
                                .key = "",
                                .parse = parse_grouped_query,
                                .rules = rules::grouped_query_with_biases(),
                                .models = "Llama 2 and 3, SmolLM2, Yi, Vicuna",
                                .features = "biases anywhere in attention"};
  return family;
}

}  // namespace relatent
