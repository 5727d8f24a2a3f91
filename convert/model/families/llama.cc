// Llama 2 and 3, and what else says `llama`: SmolLM2, Yi, Vicuna. Any projection may have a bias.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/rules.h"

namespace relatent {

const Family& llama_family() {
  static const Family family = {
      .name = "llama",
      .model_type = "llama",
      .key = "",
      .parse = parse_grouped_query,
      .rules = rules::append(
          rules::grouped_query(rules::optional),
          {{Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", rules::optional, rules::hidden},
           {Role::gate_bias, "model.layers.{i}.mlp.gate_proj.bias", rules::optional, rules::intermediate},
           {Role::up_bias, "model.layers.{i}.mlp.up_proj.bias", rules::optional, rules::intermediate},
           {Role::down_bias, "model.layers.{i}.mlp.down_proj.bias", rules::optional, rules::hidden}})};
  return family;
}

}  // namespace relatent
