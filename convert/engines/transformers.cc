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

  EngineTraits traits() const override {
    return {.query_bias = false, .pads_latent = true, .own_coordinates = 1};
  }

  Index cache_numbers(const LatentShape& shape) const override { return stored_rank(shape) + shape.rope_dim; }

  std::vector<TensorSpec> attention_tensors(const ModelConfig& source, const LatentShape& shape,
                                            Index layer_idx, DType dtype) const override {
    const Index hidden = source.hidden_size;
    const Index q_rows = shape.heads * (shape.nope_dim + shape.rope_dim);
    const Index rank = stored_rank(shape);
    const Index kv_rows = rank + shape.rope_dim;
    std::vector<TensorSpec> out;
    const auto add = [&](const char* rest, std::vector<std::int64_t> size) {
      out.push_back({attention_name(layer_idx, rest), dtype, std::move(size)});
    };
    const std::optional<Index> q_rank = stored_q_rank(shape, hidden);
    if (q_rank) {
      add("q_a_proj.weight", {*q_rank, hidden});
      add("q_a_proj.bias", {*q_rank});
      add("q_a_layernorm.weight", {*q_rank});
      add("q_b_proj.weight", {q_rows, *q_rank});
    } else {
      add("q_proj.weight", {q_rows, hidden});
    }
    add("kv_a_proj_with_mqa.weight", {kv_rows, hidden});
    add("kv_a_proj_with_mqa.bias", {kv_rows});
    add("kv_a_layernorm.weight", {rank});
    add("kv_b_proj.weight", {shape.heads * (shape.nope_dim + shape.v_dim), rank});
    add("o_proj.weight", {hidden, shape.heads * shape.v_dim});
    add("o_proj.bias", {hidden});
    return out;
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

  void write_attention(const LatentAttention& a, const LatentShape& shape, Index layer_idx, DType dtype,
                       CheckpointWriter& out) const override {
    const auto put = [&](const char* rest, const auto& values) {
      out.write_floats(attention_name(layer_idx, rest),
                       {values.data(), static_cast<std::size_t>(values.size())});
    };
    write_query(a, shape, dtype, put);

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
    put("kv_a_proj_with_mqa.weight", kv_a);
    put("kv_a_proj_with_mqa.bias", kv_a_bias);
    put("kv_a_layernorm.weight", gain);
    put("kv_b_proj.weight", kv_b);
    put("o_proj.weight", a.o.weight);
    put("o_proj.bias", bias_or_zero(a.o));
  }

 private:
  static Index stored_rank(const LatentShape& shape) { return shape.rank + shape.dead_coordinates + 1; }

  // A query bias needs the constant coordinate of a query latent, so an uncompressed query with a bias passes
  // x through as its own latent.
  static std::optional<Index> stored_q_rank(const LatentShape& shape, Index hidden) {
    if (shape.q_rank) {
      return *shape.q_rank + 1;
    }
    return shape.has_q_bias ? std::optional<Index>(hidden + 1) : std::nullopt;
  }

  template <typename Put>
  static void write_query(const LatentAttention& a, const LatentShape& shape, DType dtype, const Put& put) {
    const Index n = a.nope_dim;
    const Index p = a.rope_dim;
    const bool compressed = a.q_down.out() > 0;
    if (!compressed && !shape.has_q_bias) {
      MatrixF q = a.q.weight * static_cast<float>(query_rescale(a));
      for (Index h = 0; h < a.heads; ++h) {
        to_pairs(q, h * (n + p) + n, p);
      }
      put("q_proj.weight", q);
      return;
    }
    StoredQuery query = store_query(a, a.q.weight.cols() + 1, dtype);
    for (Index h = 0; h < a.heads; ++h) {
      to_pairs(query.up, h * (n + p) + n, p);
    }
    put("q_a_proj.weight", query.down);
    put("q_a_proj.bias", query.down_bias);
    put("q_a_layernorm.weight", query.gain);
    put("q_b_proj.weight", query.up);
  }
};

}  // namespace

std::unique_ptr<Engine> make_transformers_engine() {
  return std::make_unique<TransformersEngine>();
}

}  // namespace relatent
