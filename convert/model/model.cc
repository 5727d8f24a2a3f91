#include "convert/model/model.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "formats/error.h"

namespace relatent {
namespace {

// transformers builds the norms on the latents without an eps argument, so it is this whatever the config
// says.
constexpr float latent_norm_eps = 1e-6F;

// Brings the p rotary rows starting at `first` from interleaved pairs (2j, 2j+1) to halves (j, j + p/2).
template <typename Matrix>
void to_halves(Matrix& m, Index first, Index p) {
  const Matrix pairs = m.middleRows(first, p);
  for (Index j = 0; j < p / 2; ++j) {
    m.row(first + j) = pairs.row(2 * j);
    m.row(first + j + p / 2) = pairs.row(2 * j + 1);
  }
}

}  // namespace

Model::Model(Checkpoint checkpoint, ModelConfig config)
    : checkpoint_(std::move(checkpoint)),
      config_(std::move(config)),
      tensors_(place_tensors(checkpoint_, config_)) {
  for (const PlacedTensor& tensor : tensors_) {
    names_[{tensor.role, tensor.layer_idx}] = tensor.name;
  }
}

Model Model::open(const std::filesystem::path& folder) {
  Checkpoint checkpoint = Checkpoint::open(folder);
  ModelConfig config = parse_config(checkpoint.config(), checkpoint.config_path());
  return {std::move(checkpoint), std::move(config)};
}

MatrixF Model::matrix(Role role, Index layer_idx) const {
  const std::string& name = name_of(role, layer_idx);
  MatrixF out = checkpoint_.read_matrix(name);
  checkpoint_.release(name);
  if (!out.allFinite()) {
    fail_input({checkpoint_.file_of(name).path(), name, "holds a value that is not finite", "finite weights",
                "NaN or infinity", ""});
  }
  return out;
}

RowVectorF Model::vector_or_empty(Role role, Index layer_idx) const {
  return has(role, layer_idx) ? RowVectorF(matrix(role, layer_idx).row(0)) : RowVectorF();
}

Linear Model::linear(Role weight, Role bias, Index layer_idx) const {
  return {matrix(weight, layer_idx), vector_or_empty(bias, layer_idx)};
}

RmsNorm Model::norm(Role role, Index layer_idx) const {
  return {vector_or_empty(role, layer_idx), static_cast<float>(config_.rms_norm_eps)};
}

GqaAttention Model::gqa(Index layer_idx) const {
  GqaAttention out;
  out.heads = config_.num_attention_heads;
  out.kv_heads = config_.gqa->num_key_value_heads;
  out.head_dim = config_.gqa->head_dim;
  out.window = config_.sliding_window.value_or(0);
  out.scale = 1.0F / std::sqrt(static_cast<float>(out.head_dim));
  out.q = linear(Role::q_weight, Role::q_bias, layer_idx);
  out.k = linear(Role::k_weight, Role::k_bias, layer_idx);
  out.v = linear(Role::v_weight, Role::v_bias, layer_idx);
  out.o = linear(Role::o_weight, Role::o_bias, layer_idx);
  out.rotary = config_.rotary;
  return out;
}

LatentAttention Model::latent(Index layer_idx) const {
  const MlaGeometry& mla = *config_.mla;
  const Index n = mla.qk_nope_head_dim;
  const Index p = mla.qk_rope_head_dim;
  const Index r = mla.kv_lora_rank;
  LatentAttention out;
  out.heads = config_.num_attention_heads;
  out.nope_dim = n;
  out.rope_dim = p;
  out.v_dim = mla.v_head_dim;
  out.scale = static_cast<float>(mla.scale_factor / std::sqrt(static_cast<double>(n + p)));
  if (mla.q_lora_rank) {
    out.q_down = linear(Role::q_a_weight, Role::q_a_bias, layer_idx);
    out.q_norm = {vector_or_empty(Role::q_a_norm, layer_idx), latent_norm_eps};
  }
  out.q.weight = matrix(Role::q_weight, layer_idx);
  const Linear kv_a = linear(Role::kv_a_weight, Role::kv_a_bias, layer_idx);
  LatentBranch branch;
  branch.down.weight = kv_a.weight.topRows(r);
  out.rotary_key.weight = kv_a.weight.bottomRows(p);
  if (kv_a.bias.size() > 0) {
    branch.down.bias = kv_a.bias.head(r);
    out.rotary_key.bias = kv_a.bias.tail(p);
  }
  branch.norm = {vector_or_empty(Role::kv_a_norm, layer_idx), latent_norm_eps};
  branch.up = matrix(Role::kv_b_weight, layer_idx);
  branch.head_count = out.heads;
  out.branches.push_back(std::move(branch));
  out.o = linear(Role::o_weight, Role::o_bias, layer_idx);
  out.rotary = config_.rotary;
  if (mla.rope_interleave) {
    for (Index h = 0; h < out.heads; ++h) {
      to_halves(out.q.weight, h * (n + p) + n, p);
    }
    to_halves(out.rotary_key.weight, 0, p);
    if (out.rotary_key.bias.size() > 0) {
      MatrixF column = out.rotary_key.bias.transpose();
      to_halves(column, 0, p);
      out.rotary_key.bias = column.transpose();
    }
  }
  return out;
}

Attention Model::attention(Index layer_idx) const {
  if (config_.gqa) {
    return gqa(layer_idx);
  }
  return latent(layer_idx);
}

Layer Model::layer(Index layer_idx) const {
  return {norm(Role::input_norm, layer_idx),
          attention(layer_idx),
          norm(Role::post_attention_norm, layer_idx),
          linear(Role::gate_weight, Role::gate_bias, layer_idx),
          linear(Role::up_weight, Role::up_bias, layer_idx),
          linear(Role::down_weight, Role::down_bias, layer_idx)};
}

MatrixF Model::embed(const std::vector<std::int32_t>& ids) const {
  const std::string& name = name_of(Role::embed_tokens, -1);
  const TensorInfo& info = checkpoint_.info(name);
  const std::span<const std::byte> bytes = checkpoint_.bytes(name);
  const std::size_t row_bytes = static_cast<std::size_t>(config_.hidden_size) * size_of(info.dtype);
  MatrixF out(static_cast<Index>(ids.size()), config_.hidden_size);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    decode_floats(info.dtype, bytes.subspan(static_cast<std::size_t>(ids[i]) * row_bytes, row_bytes),
                  {out.row(static_cast<Index>(i)).data(), static_cast<std::size_t>(config_.hidden_size)});
  }
  return out;
}

MatrixF Model::head_rows(Index first, Index count) const {
  const std::string& name = name_of(config_.tie_word_embeddings ? Role::embed_tokens : Role::lm_head, -1);
  const TensorInfo& info = checkpoint_.info(name);
  const std::size_t row_bytes = static_cast<std::size_t>(config_.hidden_size) * size_of(info.dtype);
  MatrixF out(count, config_.hidden_size);
  decode_floats(info.dtype,
                checkpoint_.bytes(name).subspan(static_cast<std::size_t>(first) * row_bytes,
                                                static_cast<std::size_t>(count) * row_bytes),
                {out.data(), static_cast<std::size_t>(out.size())});
  return out;
}

}  // namespace relatent
