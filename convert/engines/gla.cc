#include "convert/engines/gla.h"

#include <nlohmann/json.hpp>

#include "convert/engines/layout.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

constexpr Index latents = 2;
// The module's is the config's; beside the constant coordinates either is nothing.
constexpr double norm_eps = 1e-6;
// Sizes of the stored latents by the head size.
Index stored_rank(Index head_dim) {
  return 2 * head_dim;
}
Index stored_q_rank(Index head_dim) {
  return 8 * head_dim;
}

class GlaEngine final : public Engine {
 public:
  std::string_view name() const override { return "gla"; }

  std::string_view family() const override { return "gla"; }

  EngineTraits traits() const override {
    return {.forms = {"gla"}, .any_frequencies = false, .latent_source = false};
  }

  // One coordinate of each latent is the constant that undoes its norm.
  std::optional<Index> default_rank(const ModelConfig& source) const override {
    return latents * (stored_rank(source.gqa->head_dim) - 1);
  }
  std::optional<Index> query_rank(const ModelConfig& source) const override {
    const Index most = stored_q_rank(source.gqa->head_dim) - 1;
    return source.hidden_size > most ? std::optional<Index>(most) : std::nullopt;
  }

  std::string why_not(const ModelConfig& /*source*/, const LatentShape& shape) const override {
    if (shape.branches.size() != latents || shape.branches.front().head_count * latents != shape.heads) {
      return "the GLA authors' module has two latents, each for half of the heads: give --branches 2";
    }
    const Index most = stored_rank(shape.qk_nope_head_dim) - 1;
    for (const BranchGeometry& branch : shape.branches) {
      if (branch.rank > most) {
        return "the GLA authors' module has latents of 2 head_dim, so --rank is at most " +
               std::to_string(latents * most);
      }
    }
    return "";
  }

  Json config(const Json& source_config, const ModelConfig& source, const LatentShape& shape,
              const Rotary& rotary, DType dtype) const override {
    Json out;
    out["architectures"] = {"LlamaForCausalLM"};
    out["model_type"] = "llama";
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
      if (source_config.contains(key)) {
        out[key] = source_config[key];
      }
    }
    out["attention_bias"] = true;
    out["attention_dropout"] = 0.0;
    out["dtype"] = torch_name(dtype);
    out["head_dim"] = shape.qk_nope_head_dim;
    out["hidden_act"] = "silu";
    out["hidden_size"] = source.hidden_size;
    out["intermediate_size"] = source.intermediate_size;
    out["max_position_embeddings"] = source.max_position_embeddings;
    out["mlp_bias"] = false;
    out["num_attention_heads"] = shape.heads;
    out["num_hidden_layers"] = source.num_hidden_layers;
    // Unused; what LlamaConfig would otherwise derive its checks from.
    out["num_key_value_heads"] = shape.heads;
    out["qk_rope_dim"] = shape.qk_rope_head_dim;
    out["rms_norm_eps"] = source.rms_norm_eps;
    out["rope_scaling"] = nullptr;
    out["rope_theta"] = geometric_base(rotary);
    out["tie_word_embeddings"] = false;
    out["use_cache"] = true;
    out["vocab_size"] = source.vocab_size;
    return out;
  }

  void write_attention(const LatentAttention& a, const LatentShape& /*shape*/, DType dtype,
                       const LayerWriter& out) const override {
    const Index n = a.nope_dim;
    const Index p = a.rope_dim;
    const Index rank = stored_rank(n);
    const StoredQuery query = store_query(a, stored_q_rank(n), dtype);
    out.put(Role::q_a_weight, query.down);
    out.put(Role::q_a_bias, query.down_bias);
    out.put(Role::q_a_norm, query.gain);
    out.put(Role::q_weight, query.up);
    out.put(Role::q_bias, RowVectorF(RowVectorF::Zero(query.up.rows())));
    MatrixF down = MatrixF::Zero(latents * rank + p, a.rotary_key.weight.cols());
    RowVectorF bias = RowVectorF::Zero(down.rows());
    for (Index b = 0; b < latents; ++b) {
      const LatentBranch& branch = a.branches[static_cast<std::size_t>(b)];
      const Index used = branch.down.out();
      const double mean_square =
          branch.mean_square * static_cast<double>(used) / static_cast<double>(rank - 1);
      const NormUndo undo = undo_norm(rank - 1, mean_square, norm_eps, dtype);
      down.middleRows(b * rank, used) = branch.down.weight * static_cast<float>(undo.scale);
      bias.segment(b * rank, used) = bias_or_zero(branch.down) * static_cast<float>(undo.scale);
      bias((b + 1) * rank - 1) = static_cast<float>(undo.beta);
      RowVectorF gain = RowVectorF::Constant(rank, static_cast<float>(undo.gain));
      gain(rank - 1) = 0;  // nothing reads the constant
      out.put(Role::kv_a_norm, gain, b);
      MatrixF up = MatrixF::Zero(branch.up.rows(), rank);
      up.leftCols(used) = branch.up * static_cast<float>(undo.correction);
      out.put(Role::kv_b_weight, up, b);
      out.put(Role::kv_b_bias, RowVectorF(RowVectorF::Zero(up.rows())), b);
    }
    down.bottomRows(p) = a.rotary_key.weight;
    bias.tail(p) = bias_or_zero(a.rotary_key);
    out.put(Role::kv_a_weight, down);
    out.put(Role::kv_a_bias, bias);
    out.put(Role::o_weight, a.o.weight);
    out.put(Role::o_bias, bias_or_zero(a.o));
  }
};

}  // namespace

std::unique_ptr<Engine> make_gla_engine() {
  return std::make_unique<GlaEngine>();
}

}  // namespace relatent
