#include "convert/engines/transformers.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "convert/engines/layout.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

class TransformersEngine final : public Engine {
 public:
  std::string_view name() const override { return "transformers"; }

  std::string_view family() const override { return "deepseek_v3"; }

  EngineTraits traits() const override {
    return {.forms = {"mla"},
            // What stock transformers has no class for is run by the code that goes with our own layout.
            .instead = "relatent",
            .query_bias = false,
            .own_coordinates = 1,
            .pads_latent = true};
  }

  Json config(const Json& source_config, const ModelConfig& source, const LatentShape& shape,
              const Rotary& rotary, DType dtype) const override {
    Json out = deepseek_config(source_config, source, shape, dtype);
    out["attention_bias"] = true;
    out["kv_lora_rank"] = stored_rank(shape);
    const std::optional<Index> q_rank = stored_q_rank(shape, source.hidden_size);
    out["q_lora_rank"] = q_rank ? Json(*q_rank) : Json(nullptr);
    out["rope_parameters"] = explicit_rope_parameters(rotary, source.max_position_embeddings);
    out["tie_word_embeddings"] = source.tie_word_embeddings;
    return out;
  }

  void write_attention(const LatentAttention& a, const LatentShape& shape, DType dtype,
                       const LayerWriter& out) const override {
    write_query(a, shape, dtype, out);

    const LatentBranch& branch = a.branches.front();
    // The latent, dead coordinates, the constant.
    const Index rank = branch.down.out();
    const Index size = stored_rank(shape);
    const Index p = a.rope_dim;
    const double mean_square = branch.mean_square * static_cast<double>(rank) / static_cast<double>(size - 1);
    const NormUndo undo = undo_norm(size - 1, mean_square, latent_norm_eps, dtype);
    MatrixF kv_a = MatrixF::Zero(size + p, branch.down.weight.cols());
    kv_a.topRows(rank) = branch.down.weight * static_cast<float>(undo.scale);
    kv_a.bottomRows(p) = a.rotary_key.weight;
    MatrixF kv_a_bias = MatrixF::Zero(size + p, 1);
    kv_a_bias.topRows(rank) = bias_or_zero(branch.down).transpose() * static_cast<float>(undo.scale);
    kv_a_bias(size - 1, 0) = static_cast<float>(undo.beta);
    kv_a_bias.bottomRows(p) = bias_or_zero(a.rotary_key).transpose();
    to_pairs(kv_a, size, p);
    to_pairs(kv_a_bias, size, p);
    RowVectorF gain = RowVectorF::Constant(size, static_cast<float>(undo.gain));
    gain(size - 1) = 0;  // nothing reads the constant, so an absorbed cache holds a zero there
    MatrixF kv_b = MatrixF::Zero(branch.up.rows(), size);
    kv_b.leftCols(rank) = branch.up * static_cast<float>(undo.correction);
    out.put(Role::kv_a_weight, kv_a);
    out.put(Role::kv_a_bias, kv_a_bias);
    out.put(Role::kv_a_norm, gain);
    out.put(Role::kv_b_weight, kv_b);
    out.put(Role::o_weight, a.o.weight);
    out.put(Role::o_bias, bias_or_zero(a.o));
  }

  // Biases and free frequencies need transformers' own classes.
  std::vector<std::string> readers(const ModelConfig& config) const override {
    const LatentGeometry& latent = *config.latent;
    if (!latent.attention_bias && config.rotary.rope_type != "longrope") {
      return {};
    }
    return {"read by transformers, stock: deepseek_v3",
            vllm_line({latent.kv_lora_rank, latent.qk_rope_head_dim},
                      "vllm serve FOLDER --model-impl transformers")};
  }

 private:
  static Index stored_rank(const LatentShape& shape) {
    return shape.kv_lora_rank + shape.dead_coordinates + 1;
  }

  // A query bias needs the constant coordinate of a query latent, so an uncompressed query with a bias passes
  // x through as its own latent.
  static std::optional<Index> stored_q_rank(const LatentShape& shape, Index hidden) {
    if (shape.q_lora_rank) {
      return *shape.q_lora_rank + 1;
    }
    return shape.has_q_bias ? std::optional<Index>(hidden + 1) : std::nullopt;
  }

  static void write_query(const LatentAttention& a, const LatentShape& shape, DType dtype,
                          const LayerWriter& out) {
    const Index n = a.nope_dim;
    const Index p = a.rope_dim;
    const bool compressed = a.q_down.out() > 0;
    if (!compressed && !shape.has_q_bias) {
      MatrixF q = a.q.weight * static_cast<float>(query_rescale(a));
      for (Index h = 0; h < a.heads; ++h) {
        to_pairs(q, h * (n + p) + n, p);
      }
      out.put(Role::q_weight, q);
      return;
    }
    StoredQuery query = store_query(a, a.q.weight.cols() + 1, dtype);
    for (Index h = 0; h < a.heads; ++h) {
      to_pairs(query.up, h * (n + p) + n, p);
    }
    out.put(Role::q_a_weight, query.down);
    out.put(Role::q_a_bias, query.down_bias);
    out.put(Role::q_a_norm, query.gain);
    out.put(Role::q_weight, query.up);
  }
};

}  // namespace

std::unique_ptr<Engine> make_transformers_engine() {
  return std::make_unique<TransformersEngine>();
}

}  // namespace relatent
