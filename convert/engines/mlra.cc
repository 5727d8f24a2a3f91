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

  std::string_view family() const override { return "mlra"; }

  EngineTraits traits() const override {
    return {.forms = {"mlra", "gla"},
            .any_frequencies = false,
            .fixed_base = rotary_base,
            .normed_latent = true,
            .normed_query = true,
            .latent_source = false,
            .stores_tied_head = true,
            .must_tie = true,
            .norm_eps = eps};
  }

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
    out["q_lora_rank"] = *shape.q_lora_rank;
    out["qk_nope_head_dim"] = shape.qk_nope_head_dim;
    out["qk_rope_head_dim"] = shape.qk_rope_head_dim;
    out["tie_word_embeddings"] = true;
    out["vocab_size"] = source.vocab_size;
    return out;
  }

  void write_attention(const LatentAttention& a, const LatentShape& shape, DType /*dtype*/,
                       const LayerWriter& out) const override {
    const auto count = static_cast<Index>(a.branches.size());
    const Index hidden = a.q_down.weight.cols();
    const Index n = a.nope_dim;
    const Index p = a.rope_dim;
    const Index rank = stored_rank(shape) / count;
    check(a, rank);
    out.put(Role::q_a_weight, a.q_down.weight);
    out.put(Role::q_a_norm, a.q_norm.gain);
    const double scale = query_rescale(a) / latent_scale(hidden, a.q_down.out());
    out.put(Role::q_weight, MatrixF(a.q.weight * static_cast<float>(scale)));
    MatrixF kv_a(count * rank + p, hidden);
    MatrixF kv_b(count * rank, a.branches.front().up.rows());
    for (Index b = 0; b < count; ++b) {
      const LatentBranch& branch = a.branches[static_cast<std::size_t>(b)];
      kv_a.middleRows(b * rank, rank) = branch.down.weight;
      out.put(Role::kv_a_norm, branch.norm.gain, b);
      MatrixF up = branch.up * static_cast<float>(1 / latent_scale(hidden, rank));
      const auto values = static_cast<float>(1 / branch_scale(shape));
      for (Index h = 0; h < branch.head_count; ++h) {
        up.middleRows(h * 2 * n + n, n) *= values;
      }
      if (by_pairs(shape)) {
        out.put(Role::kv_b_weight, up, b);
      } else {
        kv_b.middleRows(b * rank, rank) = up.transpose();
      }
    }
    kv_a.bottomRows(p) = a.rotary_key.weight;
    out.put(Role::kv_a_weight, kv_a);
    if (!by_pairs(shape)) {
      out.put(Role::kv_b_weight, kv_b);
    }
    out.put(Role::o_weight, a.o.weight);
  }

 private:
  static Index branch_count(const LatentShape& shape) {
    return shape.form == "mlra" && shape.branches.front().head_count < shape.heads
               ? 2
               : static_cast<Index>(shape.branches.size());
  }
  // gla_2 came first and has a tensor for each latent.
  static bool by_pairs(const LatentShape& shape) { return shape.branches.size() == 2; }
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
      fits = fits && branch.down.bias.size() == 0 && !branch.shared && branch.norm.present() &&
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
