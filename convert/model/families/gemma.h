// What Gemma 2 and 3 share.
#pragma once

#include <vector>

#include "convert/model/config.h"
#include "convert/model/config_reader.h"
#include "convert/model/families/parse.h"
#include "convert/model/tensor_rule.h"

namespace relatent {

// What a Gemma takes where its config says nothing, as its class in transformers does.
struct GemmaDefaults {
  Index full_every = 2;                            // every how many-th layer sees all positions
  std::optional<double> attn_logit_softcapping{};  // null in a config always says none
  std::optional<double> final_logit_softcapping{};
};

// Norms before and behind both blocks that multiply by 1 + their weight, embeddings times the root of the
// hidden size, gelu, score scale query_pre_attn_scalar^-1/2, windows in most layers, softcaps.
void parse_gemma(const ConfigReader& in, const GemmaDefaults& defaults, ModelConfig& out);

// A grouped-query model with Gemma's names for the four norms of a layer.
std::vector<TensorRule> gemma_rules();

}  // namespace relatent
