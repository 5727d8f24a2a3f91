#include "convert/engines/deepseek.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "convert/engines/layout.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

class DeepseekEngine final : public Engine {
 public:
  std::string_view name() const override { return "deepseek"; }

  EngineTraits traits() const override {
    return {.any_frequencies = false,
            .query_bias = false,
            .pads_latent = true,
            .undoes_norm = false,
            .tied_head = false};
  }

  Index cache_numbers(const LatentShape& shape) const override { return stored_rank(shape) + shape.rope_dim; }

  std::vector<TensorSpec> attention_tensors(const ModelConfig& source, const LatentShape& shape,
                                            Index layer_idx, DType dtype) const override {
    const Index rank = stored_rank(shape);
    std::vector<TensorSpec> out;
    const auto add = [&](const char* rest, std::vector<std::int64_t> size) {
      out.push_back({attention_name(layer_idx, rest), dtype, std::move(size)});
    };
    add("q_proj.weight", {shape.heads * (shape.nope_dim + shape.rope_dim), source.hidden_size});
    add("kv_a_proj_with_mqa.weight", {rank + shape.rope_dim, source.hidden_size});
    add("kv_a_layernorm.weight", {rank});
    add("kv_b_proj.weight", {shape.heads * (shape.nope_dim + shape.v_dim), rank});
    add("o_proj.weight", {source.hidden_size, shape.heads * shape.v_dim});
    return out;
  }

  Json config(const Json& source_config, const ModelConfig& source, const LatentShape& shape,
              const Rotary& rotary, DType dtype) const override {
    Json out = deepseek_config(source_config, source, shape, dtype);
    out["attention_bias"] = false;
    out["kv_lora_rank"] = stored_rank(shape);
    out["q_lora_rank"] = nullptr;
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

  void write_attention(const LatentAttention& a, const LatentShape& shape, Index layer_idx, DType /*dtype*/,
                       CheckpointWriter& out) const override {
    const auto put = [&](const char* rest, const auto& values) {
      out.write_floats(attention_name(layer_idx, rest),
                       {values.data(), static_cast<std::size_t>(values.size())});
    };
    const LatentBranch& branch = a.branches.front();
    if (a.q.bias.size() > 0 || a.o.bias.size() > 0 || branch.down.bias.size() > 0 ||
        a.rotary_key.bias.size() > 0 || !branch.norm.present()) {
      throw std::logic_error("deepseek: the layer has a bias, or no norm on its latent");
    }
    const Index n = a.nope_dim;
    const Index p = a.rope_dim;
    // Engines multiply scores by (n + p)^-1/2; the difference to the wanted scale goes into the query.
    const double rescale = static_cast<double>(a.scale) * std::sqrt(static_cast<double>(n + p));
    MatrixF q = a.q.weight * static_cast<float>(rescale);
    for (Index h = 0; h < a.heads; ++h) {
      to_pairs(q, h * (n + p) + n, p);
    }
    put("q_proj.weight", q);
    const Index rank = stored_rank(shape);
    MatrixF kv_a(rank + p, branch.down.weight.cols());
    kv_a << branch.down.weight, a.rotary_key.weight;
    to_pairs(kv_a, rank, p);
    put("kv_a_proj_with_mqa.weight", kv_a);
    put("kv_a_layernorm.weight", branch.norm.gain);
    put("kv_b_proj.weight", branch.up);
    put("o_proj.weight", a.o.weight);
  }

 private:
  static Index stored_rank(const LatentShape& shape) { return shape.rank + shape.norm_coordinates; }
};

}  // namespace

std::unique_ptr<Engine> make_deepseek_engine() {
  return std::make_unique<DeepseekEngine>();
}

}  // namespace relatent
