#include "convert/engines/layout.h"

#include <nlohmann/json.hpp>

namespace relatent {

std::string attention_name(Index layer_idx, const char* rest) {
  return "model.layers." + std::to_string(layer_idx) + ".self_attn." + rest;
}

void to_pairs(MatrixF& m, Index first, Index p) {
  const MatrixF halves = m.middleRows(first, p);
  for (Index j = 0; j < p / 2; ++j) {
    m.row(first + 2 * j) = halves.row(j);
    m.row(first + 2 * j + 1) = halves.row(j + p / 2);
  }
}

RowVectorF bias_or_zero(const Linear& linear) {
  return linear.bias.size() > 0 ? linear.bias : RowVectorF(RowVectorF::Zero(linear.out()));
}

nlohmann::ordered_json deepseek_config(const nlohmann::ordered_json& source_config, const ModelConfig& source,
                                       const LatentShape& shape, DType dtype) {
  nlohmann::ordered_json out;
  out["architectures"] = {"DeepseekV3ForCausalLM"};
  out["model_type"] = "deepseek_v3";
  out["attention_dropout"] = 0.0;
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
    if (source_config.contains(key)) {
      out[key] = source_config[key];
    }
  }
  out["dtype"] = torch_name(dtype);
  // Every layer is dense; the mixture-of-experts keys must be present and typed, but nothing reads them.
  out["first_k_dense_replace"] = source.num_hidden_layers;
  out["head_dim"] = shape.rope_dim;
  out["hidden_act"] = "silu";
  out["hidden_size"] = source.hidden_size;
  out["initializer_range"] =
      source_config.contains("initializer_range") && source_config["initializer_range"].is_number()
          ? source_config["initializer_range"].get<double>()
          : 0.02;
  out["intermediate_size"] = source.intermediate_size;
  out["max_position_embeddings"] = source.max_position_embeddings;
  out["moe_intermediate_size"] = source.intermediate_size;
  out["moe_layer_freq"] = 1;
  out["n_group"] = 1;
  out["n_routed_experts"] = 2;
  out["n_shared_experts"] = 1;
  out["norm_topk_prob"] = true;
  out["num_attention_heads"] = shape.heads;
  out["num_experts_per_tok"] = 1;
  out["num_hidden_layers"] = source.num_hidden_layers;
  out["num_key_value_heads"] = shape.heads;
  out["num_nextn_predict_layers"] = 0;
  out["qk_head_dim"] = shape.nope_dim + shape.rope_dim;
  out["qk_nope_head_dim"] = shape.nope_dim;
  out["qk_rope_head_dim"] = shape.rope_dim;
  out["rms_norm_eps"] = source.rms_norm_eps;
  out["rope_interleave"] = true;
  out["routed_scaling_factor"] = 1.0;
  out["topk_group"] = 1;
  out["use_cache"] = true;
  out["v_head_dim"] = shape.v_dim;
  out["vocab_size"] = source.vocab_size;
  return out;
}

}  // namespace relatent
