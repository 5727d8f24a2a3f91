// Qwen2 and Qwen2.5: biases on queries, keys and values. Where `use_sliding_window` says so, the layers from
// `max_window_layers` on have a sliding window, or those that `layer_types` names.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

void parse_qwen2(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, {.windows = qwen_windows}, out);
}

}  // namespace

const Family& qwen2_family() {
  static const Family family = {.name = "qwen2",
                                .model_type = "qwen2",
                                .key = "",
                                .parse = parse_qwen2,
                                .rules = rules::grouped_query(rules::required),
                                .models = "Qwen2, Qwen2.5, QwQ",
                                .features = "biases on q, k, v; windows by layer"};
  return family;
}

}  // namespace relatent
