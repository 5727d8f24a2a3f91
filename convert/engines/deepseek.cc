#include "convert/engines/deepseek.h"

#include <nlohmann/json.hpp>

#include "convert/engines/layout.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

class DeepseekEngine final : public Engine {
 public:
  std::string_view name() const override { return "deepseek"; }

  std::string_view family() const override { return "deepseek_v3"; }

  EngineTraits traits() const override {
    return {.forms = {"mla"},
            .any_frequencies = false,
            .query_bias = false,
            .normed_latent = true,
            .pads_latent = true,
            .linear_stand_in = true};
  }

  Json config(const Json& source_config, const ModelConfig& source, const LatentShape& shape,
              const Rotary& rotary, DType dtype) const override {
    Json out = deepseek_config(source_config, source, shape, dtype);
    out["attention_bias"] = false;
    out["kv_lora_rank"] = stored_rank(shape);
    out["q_lora_rank"] = shape.q_lora_rank ? Json(*shape.q_lora_rank) : Json(nullptr);
    const double base = geometric_base(rotary);
    // YaRN of factor 1 is the plain list, and every reader knows it for this model type, whose published
    // checkpoints are YaRN; vLLM 0.32 rotates a `default` list wrongly on CPUs.
    out["rope_parameters"] = {{"rope_type", "yarn"},
                              {"rope_theta", base},
                              {"factor", 1.0},
                              {"original_max_position_embeddings", source.max_position_embeddings}};
    // Readers of the older spelling, to whom no rope_scaling means the plain list.
    out["rope_theta"] = base;
    out["tie_word_embeddings"] = false;
    return out;
  }

  void write_attention(const LatentAttention& a, const LatentShape& /*shape*/, DType /*dtype*/,
                       const LayerWriter& out) const override {
    put_query_and_latent(a, out);
    out.put(Role::kv_b_weight, a.branches.front().up);
    out.put(Role::o_weight, a.o.weight);
  }

  std::vector<std::string> readers(const ModelConfig& config) const override {
    const LatentGeometry& latent = *config.latent;
    if (latent.attention_bias || config.rotary.rope_type == "longrope") {
      return {};
    }
    return {"read by transformers, stock: deepseek_v3",
            vllm_line({latent.kv_lora_rank, latent.qk_rope_head_dim}, "vllm serve FOLDER"),
            "for llama.cpp: convert with --engine gguf"};
  }

 private:
  static Index stored_rank(const LatentShape& shape) { return shape.kv_lora_rank + shape.norm_coordinates; }
};

}  // namespace

std::unique_ptr<Engine> make_deepseek_engine() {
  return std::make_unique<DeepseekEngine>();
}

}  // namespace relatent
