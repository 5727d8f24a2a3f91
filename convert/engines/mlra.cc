#include "convert/engines/mlra.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "convert/engines/layout.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

// Fixed in the authors' code.
constexpr double rotary_base = 10000;
constexpr double eps = 1e-6;

class MlraEngine final : public Engine {
 public:
  std::string_view name() const override { return "mlra"; }

  EngineTraits traits() const override {
    return {.any_frequencies = false,
            .undoes_norm = false,
            .tied_head = false,
            .fixed_base = rotary_base,
            .normed_query = true,
            .latent_source = false,
            .must_tie = true,
            .norm_eps = eps};
  }

  Index cache_numbers(const LatentShape& shape) const override { return stored_rank(shape) + shape.rope_dim; }

  std::string why_not(const ModelConfig& /*source*/, const LatentShape& shape) const override {
    if (shape.branches.size() != 2 && shape.branches.size() != 4) {
      return "the MLRA authors' code has GLA of 2 or 4 latents";
    }
    for (const BranchGeometry& branch : shape.branches) {
      if (branch.whole_rank(shape.shared_ranks) != shape.branches.front().whole_rank(shape.shared_ranks)) {
        return "the latents must be of one size: give --per-device, or a --rank that divides evenly";
      }
      if (branch.head_count != shape.branches.front().head_count) {
        return "the heads must divide evenly over the latents";
      }
    }
    return "";
  }

  std::vector<TensorSpec> attention_tensors(const ModelConfig& source, const LatentShape& shape,
                                            Index layer_idx, DType dtype) const override {
    const Index hidden = source.hidden_size;
    const auto count = static_cast<Index>(shape.branches.size());
    const Index rank = stored_rank(shape) / count;
    const Index up_rows = 2 * shape.nope_dim * shape.branches.front().head_count;
    std::vector<TensorSpec> out;
    const auto add = [&](const std::string& rest, std::vector<std::int64_t> size) {
      out.push_back({name_in(layer_idx, rest), dtype, std::move(size)});
    };
    add("q_a_proj.weight", {*shape.q_rank, hidden});
    add("q_a_layernorm.weight", {*shape.q_rank});
    add("q_b_proj.weight", {shape.heads * (shape.nope_dim + shape.rope_dim), *shape.q_rank});
    add("kv_a_proj_with_mqa.weight", {count * rank + shape.rope_dim, hidden});
    for (Index b = 0; b < count; ++b) {
      add(norm_name(shape, b), {rank});
    }
    if (by_pairs(shape)) {
      add("kv_b_proj_1.weight", {up_rows, rank});
      add("kv_b_proj_2.weight", {up_rows, rank});
    } else {
      add("kv_b_proj", {count, rank, up_rows});
    }
    add("c_proj.weight", {hidden, shape.heads * shape.v_dim});
    return out;
  }

  std::string carried_name(Role role, Index layer_idx, const std::string& name) const override {
    switch (role) {
      case Role::embed_tokens:
        return "transformer.wte.weight";
      case Role::final_norm:
        return "layernorm.weight";
      case Role::input_norm:
        return layer_name(layer_idx, "input_layernorm.weight");
      case Role::post_attention_norm:
        return layer_name(layer_idx, "post_attention_layernorm.weight");
      case Role::gate_weight:
        return layer_name(layer_idx, "mlp.c_fc1.weight");
      case Role::up_weight:
        return layer_name(layer_idx, "mlp.c_fc2.weight");
      case Role::down_weight:
        return layer_name(layer_idx, "mlp.c_proj.weight");
      default:
        return name;
    }
  }

  Json config(const Json& source_config, const ModelConfig& source, const LatentShape& shape,
              const Rotary& rotary, DType dtype) const override {
    if (std::abs(geometric_base(rotary) - rotary_base) > 1e-3) {
      throw std::logic_error("mlra: the rotary list has another base than 10000");
    }
    Json out;
    out["architectures"] = {"GPT"};
    out["model_type"] = "gpt2";
    // Nothing in the authors' files says which of their models a checkpoint is for.
    out["mlra_model"] = shape.form + "_" + std::to_string(branch_count(shape));
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
      if (source_config.contains(key)) {
        out[key] = source_config[key];
      }
    }
    out["bias"] = false;
    out["block_size"] = source.max_position_embeddings;
    out["dropout"] = 0.0;
    out["dtype"] = torch_name(dtype);
    out["intermediate_size"] = source.intermediate_size;
    out["kv_lora_rank"] = stored_rank(shape);
    out["n_embd"] = source.hidden_size;
    out["n_head"] = shape.heads;
    out["n_layer"] = source.num_hidden_layers;
    out["q_lora_rank"] = *shape.q_rank;
    out["qk_nope_head_dim"] = shape.nope_dim;
    out["qk_rope_head_dim"] = shape.rope_dim;
    out["tie_word_embeddings"] = true;
    out["vocab_size"] = source.vocab_size;
    return out;
  }

  void write_attention(const LatentAttention& a, const LatentShape& shape, Index layer_idx, DType /*dtype*/,
                       CheckpointWriter& out) const override {
    const auto put = [&](const std::string& rest, const auto& values) {
      out.write_floats(name_in(layer_idx, rest), {values.data(), static_cast<std::size_t>(values.size())});
    };
    const auto count = static_cast<Index>(a.branches.size());
    const Index hidden = a.q_down.weight.cols();
    const Index n = a.nope_dim;
    const Index p = a.rope_dim;
    const Index rank = stored_rank(shape) / count;
    check(a, rank);
    put("q_a_proj.weight", a.q_down.weight);
    put("q_a_layernorm.weight", a.q_norm.gain);
    const double scale = query_rescale(a) / latent_scale(hidden, a.q_down.out());
    put("q_b_proj.weight", MatrixF(a.q.weight * static_cast<float>(scale)));
    MatrixF kv_a(count * rank + p, hidden);
    MatrixF kv_b(count * rank, a.branches.front().up.rows());
    for (Index b = 0; b < count; ++b) {
      const LatentBranch& branch = a.branches[static_cast<std::size_t>(b)];
      kv_a.middleRows(b * rank, rank) = branch.down.weight;
      put(norm_name(shape, b), branch.norm.gain);
      MatrixF up = branch.up * static_cast<float>(1 / latent_scale(hidden, rank));
      const auto values = static_cast<float>(1 / branch_scale(shape));
      for (Index h = 0; h < branch.head_count; ++h) {
        up.middleRows(h * 2 * n + n, n) *= values;
      }
      if (by_pairs(shape)) {
        put("kv_b_proj_" + std::to_string(b + 1) + ".weight", up);
      } else {
        kv_b.middleRows(b * rank, rank) = up.transpose();
      }
    }
    kv_a.bottomRows(p) = a.rotary_key.weight;
    put("kv_a_proj_with_mqa.weight", kv_a);
    if (!by_pairs(shape)) {
      put("kv_b_proj", kv_b);
    }
    put("c_proj.weight", a.o.weight);
  }

 private:
  static std::string layer_name(Index layer_idx, const std::string& rest) {
    return "transformer.h." + std::to_string(layer_idx) + "." + rest;
  }
  static std::string name_in(Index layer_idx, const std::string& rest) {
    return layer_name(layer_idx, "attn." + rest);
  }
  static Index branch_count(const LatentShape& shape) {
    return shape.form == "mlra" && shape.branches.front().head_count < shape.heads
               ? 2
               : static_cast<Index>(shape.branches.size());
  }
  // gla_2 came first and has a tensor for each latent.
  static bool by_pairs(const LatentShape& shape) { return shape.branches.size() == 2; }
  static std::string norm_name(const LatentShape& shape, Index b) {
    return by_pairs(shape) ? "kv_a_layernorm_" + std::to_string(b + 1) + ".weight"
                           : "kv_a_layernorms." + std::to_string(b) + ".weight";
  }
  static Index stored_rank(const LatentShape& shape) {
    Index out = 0;
    for (const BranchGeometry& branch : shape.branches) {
      out += branch.whole_rank(shape.shared_ranks) + shape.norm_coordinates;
    }
    return out;
  }
  static double latent_scale(Index hidden, Index rank) {
    return std::sqrt(static_cast<double>(hidden) / static_cast<double>(rank));
  }
  // What the heads' outputs are multiplied by before branches are summed.
  static double branch_scale(const LatentShape& shape) {
    return shape.form == "mlra" ? 1 / std::sqrt(static_cast<double>(branch_count(shape))) : 1;
  }
  static void check(const LatentAttention& a, Index rank) {
    bool fits = a.q.bias.size() == 0 && a.o.bias.size() == 0 && a.rotary_key.bias.size() == 0 &&
                a.q_down.bias.size() == 0 && a.q_norm.present() && a.v_dim == a.nope_dim;
    for (const LatentBranch& branch : a.branches) {
      fits = fits && branch.down.bias.size() == 0 && branch.shared < 0 && branch.norm.present() &&
             branch.down.out() == rank;
    }
    if (!fits) {
      throw std::logic_error("mlra: the layer has a bias, or a latent without its own norm");
    }
  }
};

}  // namespace

std::unique_ptr<Engine> make_mlra_engine() {
  return std::make_unique<MlraEngine>();
}

}  // namespace relatent
