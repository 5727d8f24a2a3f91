// Mistral 7B: no biases, and in its first version a sliding window.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {

const Family& mistral_family() {
  static const Family family = {.name = "mistral",
                                .model_type = "mistral",
                                .key = "",
                                .parse = parse_grouped_query,
                                .rules = rules::grouped_query(nullptr)};
  return family;
}

}  // namespace relatent
