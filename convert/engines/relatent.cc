#include "convert/engines/relatent.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "convert/engines/hf_files.h"
#include "convert/engines/layout.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

void put_experts(const ExpertsGeometry& experts, Json& out) {
  const bool grouped = experts.topk_method != TopkMethod::greedy;
  out["first_k_dense_replace"] = experts.first_layer;
  out["moe_intermediate_size"] = experts.intermediate_size;
  out["n_group"] = grouped ? Json(experts.groups) : Json(nullptr);
  out["n_routed_experts"] = experts.count;
  out["n_shared_experts"] = experts.shared;
  out["norm_topk_prob"] = experts.normalised;
  out["num_experts_per_tok"] = experts.per_token;
  out["routed_scaling_factor"] = experts.scale;
  out["scoring_func"] = experts.topk_method == TopkMethod::noaux_tc ? "sigmoid" : "softmax";
  out["topk_group"] = grouped ? Json(experts.groups_per_token) : Json(nullptr);
  out["topk_method"] = topk_method_name(experts.topk_method);
}

// Rows of zeros behind those of a projection.
Linear padded_rows(const Linear& linear, Index count) {
  if (count == 0) {
    return linear;
  }
  Linear out{MatrixF::Zero(linear.out() + count, linear.weight.cols()), {}};
  out.weight.topRows(linear.out()) = linear.weight;
  if (linear.bias.size() > 0) {
    out.bias = RowVectorF::Zero(linear.out() + count);
    out.bias.head(linear.out()) = linear.bias;
  }
  return out;
}

class RelatentEngine final : public Engine {
 public:
  std::string_view name() const override { return "relatent"; }

  EngineTraits traits() const override { return {.pads_latent = true}; }

  Index cache_numbers(const LatentShape& shape) const override {
    return shape.rank + shape.dead_coordinates + shape.rope_dim;
  }

  std::vector<TensorSpec> attention_tensors(const ModelConfig& source, const LatentShape& shape,
                                            Index layer_idx, DType dtype) const override {
    const Index hidden = source.hidden_size;
    const Index q_rows = shape.heads * (shape.nope_dim + shape.rope_dim);
    std::vector<TensorSpec> out;
    const auto add = [&](const std::string& rest, std::vector<std::int64_t> size) {
      out.push_back({attention_name(layer_idx, rest.c_str()), dtype, std::move(size)});
    };
    const auto add_linear = [&](const std::string& rest, Index rows, Index columns) {
      add(rest + ".weight", {rows, columns});
      if (shape.has_bias) {
        add(rest + ".bias", {rows});
      }
    };
    if (shape.q_rank) {
      add_linear("q_a_proj", *shape.q_rank, hidden);
      add("q_a_layernorm.weight", {*shape.q_rank});
      add("q_b_proj.weight", {q_rows, *shape.q_rank});
    } else {
      add_linear("q_proj", q_rows, hidden);
    }
    add_linear("k_rope_proj", shape.rope_dim, hidden);
    if (shape.norm == LatentNorm::replicated) {
      add("kv_norm_proj.weight", {shape.norm_rank, hidden});
    }
    for (std::size_t s = 0; s < shape.shared_ranks.size(); ++s) {
      add_linear("kv_shared_proj." + std::to_string(s), shape.shared_ranks[s], hidden);
    }
    for (std::size_t b = 0; b < shape.branches.size(); ++b) {
      const BranchGeometry& branch = shape.branches[b];
      const Index rank = branch.whole_rank(shape.shared_ranks) + shape.dead_coordinates;
      const std::string index = "." + std::to_string(b);
      add_linear("kv_a_proj" + index, branch.rank + shape.dead_coordinates, hidden);
      if (shape.norm == LatentNorm::branch) {
        add("kv_a_layernorm" + index + ".weight", {rank});
      }
      add("kv_b_proj" + index + ".weight", {branch.head_count * (shape.nope_dim + shape.v_dim), rank});
    }
    add_linear("o_proj", hidden, shape.heads * shape.v_dim);
    return out;
  }

  Json config(const Json& source_config, const ModelConfig& source, const LatentShape& shape,
              const Rotary& rotary, DType dtype) const override {
    Json out;
    out["architectures"] = {"RelatentForCausalLM"};
    out["model_type"] = "relatent";
    out["auto_map"] = {{"AutoConfig", "configuration_relatent.RelatentConfig"},
                       {"AutoModel", "modeling_relatent.RelatentModel"},
                       {"AutoModelForCausalLM", "modeling_relatent.RelatentForCausalLM"}};
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
      if (source_config.contains(key)) {
        out[key] = source_config[key];
      }
    }
    out["attention_bias"] = shape.has_bias;
    out["dtype"] = torch_name(dtype);
    out["head_dim"] = shape.rope_dim;  // what transformers takes for the size of the rotary embedding
    out["hidden_act"] = "silu";
    out["hidden_size"] = source.hidden_size;
    out["intermediate_size"] = source.intermediate_size;
    out["kv_lora_rank"] = shape.rank + shape.dead_coordinates;
    out["latent_branches"] = Json::array();
    for (const BranchGeometry& branch : shape.branches) {
      Json entry = {{"first_head", branch.first_head}, {"num_heads", branch.head_count}};
      entry["shared"] = branch.shared >= 0 ? Json(branch.shared) : Json(nullptr);
      entry["rank"] = branch.rank + shape.dead_coordinates;
      out["latent_branches"].push_back(std::move(entry));
    }
    out["latent_features"] = "hidden";
    out["latent_form"] = shape.form;
    out["latent_norm"] = norm_name(shape.norm);
    out["latent_norm_rank"] = shape.norm == LatentNorm::replicated ? Json(shape.norm_rank) : Json(nullptr);
    out["latent_shared_ranks"] = shape.shared_ranks;
    out["layout_version"] = 1;
    out["max_position_embeddings"] = source.max_position_embeddings;
    out["num_attention_heads"] = shape.heads;
    out["num_hidden_layers"] = source.num_hidden_layers;
    out["q_lora_rank"] = shape.q_rank ? Json(*shape.q_rank) : Json(nullptr);
    out["qk_nope_head_dim"] = shape.nope_dim;
    out["qk_rope_head_dim"] = shape.rope_dim;
    out["rms_norm_eps"] = source.rms_norm_eps;
    out["rope_parameters"] = explicit_rope_parameters(rotary, source.max_position_embeddings);
    out["tie_word_embeddings"] = source.tie_word_embeddings;
    out["use_cache"] = true;
    out["v_head_dim"] = shape.v_dim;
    out["vocab_size"] = source.vocab_size;
    if (source.experts) {
      put_experts(*source.experts, out);
    }
    return out;
  }

  std::vector<ExtraFile> extra_files() const override {
    return {{"configuration_relatent.py", hf_configuration()}, {"modeling_relatent.py", hf_modeling()}};
  }

  void write_attention(const LatentAttention& a, const LatentShape& shape, Index layer_idx, DType /*dtype*/,
                       CheckpointWriter& out) const override {
    const auto put = [&](const std::string& rest, const auto& values) {
      out.write_floats(attention_name(layer_idx, rest.c_str()),
                       {values.data(), static_cast<std::size_t>(values.size())});
    };
    const auto put_linear = [&](const std::string& rest, const Linear& linear, float factor = 1) {
      put(rest + ".weight", MatrixF(linear.weight * factor));
      if (shape.has_bias) {
        put(rest + ".bias", RowVectorF(bias_or_zero(linear) * factor));
      }
    };
    // The reader multiplies scores by (n + p)^-1/2; the difference to the wanted scale goes into the query.
    const auto rescale = static_cast<float>(static_cast<double>(a.scale) *
                                            std::sqrt(static_cast<double>(shape.nope_dim + shape.rope_dim)));
    if (shape.q_rank) {
      put_linear("q_a_proj", a.q_down);
      put("q_a_layernorm.weight", a.q_norm.gain);
      put("q_b_proj.weight", MatrixF(a.q.weight * rescale));
    } else {
      put_linear("q_proj", a.q, rescale);
    }
    put_linear("k_rope_proj", a.rotary_key);
    if (shape.norm == LatentNorm::replicated) {
      put("kv_norm_proj.weight", a.norm_rows);
    }
    for (std::size_t s = 0; s < a.shared.size(); ++s) {
      put_linear("kv_shared_proj." + std::to_string(s), a.shared[s]);
    }
    for (std::size_t b = 0; b < a.branches.size(); ++b) {
      const LatentBranch& branch = a.branches[b];
      const std::string index = "." + std::to_string(b);
      put_linear("kv_a_proj" + index, padded_rows(branch.down, shape.dead_coordinates));
      if (shape.norm == LatentNorm::branch) {
        put("kv_a_layernorm" + index + ".weight", branch.norm.gain);
      }
      MatrixF up = MatrixF::Zero(branch.up.rows(), branch.up.cols() + shape.dead_coordinates);
      up.leftCols(branch.up.cols()) = branch.up;
      put("kv_b_proj" + index + ".weight", up);
    }
    put_linear("o_proj", a.o);
  }
};

}  // namespace

std::unique_ptr<Engine> make_relatent_engine() {
  return std::make_unique<RelatentEngine>();
}

}  // namespace relatent
