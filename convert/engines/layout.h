// What every layout of DeepSeek's family shares.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "convert/engines/engine.h"

namespace relatent {

// "model.layers.<i>.self_attn.<rest>"
std::string attention_name(Index layer_idx, const char* rest);

// Halves (j, j + p/2) of rows first ... first + p to interleaved pairs (2j, 2j + 1).
void to_pairs(MatrixF& m, Index first, Index p);

RowVectorF bias_or_zero(const Linear& linear);

// config.json of a dense deepseek_v3 model; what differs between engines is left out: attention_bias,
// kv_lora_rank, q_lora_rank, rope_parameters, tie_word_embeddings.
nlohmann::ordered_json deepseek_config(const nlohmann::ordered_json& source_config, const ModelConfig& source,
                                       const LatentShape& shape, DType dtype);

}  // namespace relatent
