#include "convert/engines/layout.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace relatent {
namespace {

double round_to(DType dtype, double value) {
  return static_cast<double>(rounded(dtype, static_cast<float>(value)));
}

}  // namespace

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

std::string vllm_line(const CacheShape& shape, const std::string& command) {
  if (std::find(served_shapes.begin(), served_shapes.end(), shape) == served_shapes.end()) {
    return "not read by vLLM: no kernel for " + std::to_string(shape.latent) + " + " +
           std::to_string(shape.rotary) + " numbers, convert with --shape 512+64 or 256+64";
  }
  return "read by vLLM, stock: " + command +
         (shape == served_shapes.front() ? "" : " (GPUs only: its CPU backend takes 512 + 64)");
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
  out["head_dim"] = shape.qk_rope_head_dim;
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
  out["qk_head_dim"] = shape.qk_nope_head_dim + shape.qk_rope_head_dim;
  out["qk_nope_head_dim"] = shape.qk_nope_head_dim;
  out["qk_rope_head_dim"] = shape.qk_rope_head_dim;
  out["rms_norm_eps"] = source.rms_norm_eps;
  out["rope_interleave"] = true;
  out["routed_scaling_factor"] = 1.0;
  out["topk_group"] = 1;
  out["use_cache"] = true;
  out["v_head_dim"] = shape.v_head_dim;
  out["vocab_size"] = source.vocab_size;
  return out;
}

NormUndo undo_norm(Index rank, double mean_square, double eps, DType dtype) {
  // float16 ends at 65504, so the constant must stay smaller there: rms is then constant to about 2^-17
  // rather than 2^-33, still far finer than the dtype itself.
  const double power = dtype == DType::f16 ? 8 : 16;
  const auto size = static_cast<double>(rank + 1);
  NormUndo out;
  if (mean_square > 0) {
    out.scale = std::exp2(-std::round(std::log2(mean_square) / 2));
  }
  const double rest =
      (mean_square > 0 ? mean_square : 1.0) * out.scale * out.scale * static_cast<double>(rank);
  const auto rms_of = [&](double beta) { return std::sqrt((beta * beta + rest) / size + eps); };
  // A correction of less than half a unit in the last place would be rounded away in kv_b, so among the betas
  // of one octave take the one whose rms the dtype itself holds best.
  const int mantissa_bits = dtype == DType::bf16 ? 7 : dtype == DType::f16 ? 10 : 0;
  const double wanted = std::exp2(power) * std::sqrt(size);
  const double octave = std::exp2(std::floor(std::log2(wanted)));
  double best = 2;
  for (int i = 0; i < (1 << mantissa_bits); ++i) {
    const double beta = mantissa_bits == 0
                            ? round_to(dtype, wanted)
                            : octave * (1 + std::ldexp(static_cast<double>(i), -mantissa_bits));
    const double gain = mantissa_bits == 0 ? std::exp2(power) : round_to(dtype, rms_of(beta));
    const double correction = rms_of(beta) / gain;
    if (std::abs(correction - 1) < best) {
      best = std::abs(correction - 1);
      out.beta = beta;
      out.gain = gain / out.scale;
      out.correction = correction;
      out.constant = beta / rms_of(beta);
    }
  }
  return out;
}

double query_rescale(const LatentAttention& a) {
  return static_cast<double>(a.scale) * std::sqrt(static_cast<double>(a.nope_dim + a.rope_dim));
}

void put_query_and_latent(const LatentAttention& a, const LayerWriter& out) {
  const LatentBranch& branch = a.branches.front();
  if (a.q.bias.size() > 0 || a.q_down.bias.size() > 0 || a.o.bias.size() > 0 || branch.down.bias.size() > 0 ||
      a.rotary_key.bias.size() > 0 || !branch.norm.present()) {
    throw std::logic_error("put_query_and_latent: the layer has a bias, or no norm on its latent");
  }
  const Index n = a.nope_dim;
  const Index p = a.rope_dim;
  if (a.q_down.out() > 0) {
    out.put(Role::q_a_weight, a.q_down.weight);
    out.put(Role::q_a_norm, a.q_norm.gain);
  }
  MatrixF q = a.q.weight * static_cast<float>(query_rescale(a));
  for (Index h = 0; h < a.heads; ++h) {
    to_pairs(q, h * (n + p) + n, p);
  }
  out.put(Role::q_weight, q);
  MatrixF kv_a(branch.down.out() + p, branch.down.weight.cols());
  kv_a << branch.down.weight, a.rotary_key.weight;
  to_pairs(kv_a, branch.down.out(), p);
  out.put(Role::kv_a_weight, kv_a);
  out.put(Role::kv_a_norm, branch.norm.gain);
}

StoredQuery store_query(const LatentAttention& a, Index size, DType dtype) {
  const double rescale = query_rescale(a);
  const MatrixF q = a.q.weight * static_cast<float>(rescale);
  const bool compressed = a.q_down.out() > 0;
  const Index used = q.cols();
  const Index rank = size - 1;
  const Index hidden = compressed ? a.q_down.weight.cols() : used;
  const double mean_square = a.q_mean_square * static_cast<double>(used) / static_cast<double>(rank);
  const NormUndo undo = undo_norm(rank, mean_square, latent_norm_eps, dtype);
  StoredQuery out;
  out.down = MatrixF::Zero(size, hidden);
  out.down_bias = RowVectorF::Zero(size);
  if (compressed) {
    out.down.topRows(used) = a.q_down.weight * static_cast<float>(undo.scale);
    out.down_bias.head(used) = bias_or_zero(a.q_down) * static_cast<float>(undo.scale);
  } else {
    out.down.topRows(used).diagonal().setConstant(static_cast<float>(undo.scale));
  }
  out.down_bias(rank) = static_cast<float>(undo.beta);
  out.gain = RowVectorF::Constant(size, static_cast<float>(undo.gain));
  out.gain(rank) = 1;
  out.up = MatrixF::Zero(q.rows(), size);
  out.up.leftCols(used) = q * static_cast<float>(undo.correction);
  out.up.col(rank) = bias_or_zero(a.q).transpose() * static_cast<float>(rescale / undo.constant);
  return out;
}

}  // namespace relatent
