// Qwen2 and Qwen2.5: biases on queries, keys and values. `use_sliding_window` says whether the window holds.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {

const Family& qwen2_family() {
  static const Family family = {.name = "qwen2",
                                .model_type = "qwen2",
                                .key = "",
                                .parse = parse_grouped_query,
                                .rules = rules::grouped_query(rules::required)};
  return family;
}

}  // namespace relatent
