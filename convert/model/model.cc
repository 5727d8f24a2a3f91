#include "convert/model/model.h"

#include <array>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "formats/error.h"
#include "linalg/layouts.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Brings the p rotary rows starting at `first` from interleaved pairs (2j, 2j+1) to halves (j, j + p/2).
template <typename Matrix>
void to_halves(Matrix& m, Index first, Index p) {
  const Matrix pairs = m.middleRows(first, p);
  for (Index j = 0; j < p / 2; ++j) {
    m.row(first + j) = pairs.row(2 * j);
    m.row(first + j + p / 2) = pairs.row(2 * j + 1);
  }
}

struct Projection {
  Linear* into = nullptr;
  Role weight;
  Role bias;
};

std::array<Projection, 4> projections_of(GqaAttention& attention) {
  return {{{&attention.q, Role::q_weight, Role::q_bias},
           {&attention.o, Role::o_weight, Role::o_bias},
           {&attention.k, Role::k_weight, Role::k_bias},
           {&attention.v, Role::v_weight, Role::v_bias}}};
}

std::array<Projection, 3> projections_of(Mlp& mlp) {
  return {{{&mlp.gate, Role::gate_weight, Role::gate_bias},
           {&mlp.up, Role::up_weight, Role::up_bias},
           {&mlp.down, Role::down_weight, Role::down_bias}}};
}

}  // namespace

Model::Model(Checkpoint checkpoint, ModelConfig config)
    : checkpoint_(std::move(checkpoint)),
      config_(std::move(config)),
      tensors_(place_tensors(checkpoint_, config_)) {
  for (const PlacedTensor& tensor : tensors_) {
    names_[{tensor.role, tensor.layer_idx, tensor.part}] = tensor.name;
  }
}

Model Model::open(const std::filesystem::path& folder) {
  Checkpoint checkpoint = Checkpoint::open(folder);
  ModelConfig config = parse_config(checkpoint.config(), checkpoint.config_path());
  return {std::move(checkpoint), std::move(config)};
}

MatrixF Model::matrix(Role role, Index layer_idx, Index part) const {
  const Stage stage("read weights");
  const std::string& name = name_of(role, layer_idx, part);
  MatrixF out = checkpoint_.read_matrix(name);
  checkpoint_.release(name);
  if (!all_finite(out)) {
    fail_not_finite(name);
  }
  return out;
}

void Model::fail_not_finite(const std::string& name) const {
  fail_input({checkpoint_.file_of(name).path(), name, "holds a value that is not finite", "finite weights",
              "NaN or infinity", ""});
}

RowVectorF Model::vector_or_empty(Role role, Index layer_idx, Index part) const {
  return has(role, layer_idx, part) ? RowVectorF(matrix(role, layer_idx, part).row(0)) : RowVectorF();
}

Linear Model::linear(Role weight, Role bias, Index layer_idx, Index part) const {
  return {matrix(weight, layer_idx, part), vector_or_empty(bias, layer_idx, part)};
}

// What is stored in bfloat16 is packed as it is.
Linear Model::packed(Role weight, Role bias, Index layer_idx) const {
  const std::string& name = name_of(weight, layer_idx);
  const TensorInfo& info = checkpoint_.info(name);
  if (info.dtype != DType::bf16) {
    Linear out = linear(weight, bias, layer_idx);
    out.pack();
    return out;
  }
  const Stage stage("read weights");
  const std::span<const std::byte> bytes = checkpoint_.bytes(name);
  if (!all_finite_bf16(bytes)) {
    fail_not_finite(name);
  }
  Linear out{{},
             vector_or_empty(bias, layer_idx),
             std::make_shared<const PackedWeight>(bytes, info.shape.at(0), info.shape.at(1))};
  checkpoint_.release(name);
  return out;
}

RmsNorm Model::norm(Role role, Index layer_idx) const {
  return {vector_or_empty(role, layer_idx), static_cast<float>(config_.rms_norm_eps)};
}

GqaAttention Model::gqa_geometry() const {
  GqaAttention out;
  out.heads = config_.num_attention_heads;
  out.kv_heads = config_.gqa->num_key_value_heads;
  out.head_dim = config_.gqa->head_dim;
  out.window = config_.sliding_window.value_or(0);
  out.scale = 1.0F / std::sqrt(static_cast<float>(out.head_dim));
  out.rotary = config_.rotary;
  return out;
}

GqaAttention Model::scores(Index layer_idx) const {
  GqaAttention out = gqa_geometry();
  out.q = linear(Role::q_weight, Role::q_bias, layer_idx);
  out.k = linear(Role::k_weight, Role::k_bias, layer_idx);
  return out;
}

GqaAttention Model::gqa(Index layer_idx) const {
  GqaAttention out = gqa_geometry();
  for (const Projection& projection : projections_of(out)) {
    *projection.into = linear(projection.weight, projection.bias, layer_idx);
  }
  return out;
}

LatentAttention Model::latent(Index layer_idx) const {
  const LatentGeometry& geometry = *config_.latent;
  LatentAttention out;
  out.heads = config_.num_attention_heads;
  out.nope_dim = geometry.qk_nope_head_dim;
  out.rope_dim = geometry.qk_rope_head_dim;
  out.v_dim = geometry.v_head_dim;
  out.scale =
      static_cast<float>(geometry.scale_factor / std::sqrt(static_cast<double>(out.nope_dim + out.rope_dim)));
  if (geometry.q_lora_rank) {
    out.q_down = linear(Role::q_a_weight, Role::q_a_bias, layer_idx);
    out.q_norm = {vector_or_empty(Role::q_a_norm, layer_idx), static_cast<float>(geometry.norm_eps)};
  }
  out.q = linear(Role::q_weight, Role::q_bias, layer_idx);
  out.q.weight *= static_cast<float>(geometry.query_scale);
  out.o = linear(Role::o_weight, Role::o_bias, layer_idx);
  out.rotary = config_.rotary;
  if (has(Role::k_rope_weight, layer_idx)) {
    read_branches(layer_idx, out);
  } else {
    read_joint_latents(layer_idx, out);
  }
  if (geometry.rope_interleave) {
    const Index p = out.rope_dim;
    for (Index h = 0; h < out.heads; ++h) {
      to_halves(out.q.weight, h * (out.nope_dim + p) + out.nope_dim, p);
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

// One projection holds the rows of every latent and then the rotary key's.
void Model::read_joint_latents(Index layer_idx, LatentAttention& out) const {
  const LatentGeometry& geometry = *config_.latent;
  const Linear kv_a = linear(Role::kv_a_weight, Role::kv_a_bias, layer_idx);
  const auto rows = [&](Index first, Index count) {
    Linear part{kv_a.weight.middleRows(first, count), {}};
    if (kv_a.bias.size() > 0) {
      part.bias = kv_a.bias.segment(first, count);
    }
    return part;
  };
  const bool stacked = geometry.branches.size() > 1 && has(Role::kv_b_weight, layer_idx);
  const MatrixF all_up = stacked ? matrix(Role::kv_b_weight, layer_idx) : MatrixF();
  Index first = 0;
  for (std::size_t b = 0; b < geometry.branches.size(); ++b) {
    const BranchGeometry& sizes = geometry.branches[b];
    const Index part = geometry.branches.size() > 1 ? static_cast<Index>(b) : -1;
    LatentBranch branch;
    branch.down = rows(first, sizes.rank);
    branch.norm = {vector_or_empty(Role::kv_a_norm, layer_idx, part), static_cast<float>(geometry.norm_eps)};
    branch.first_head = sizes.first_head;
    branch.head_count = sizes.head_count;
    branch.up = stacked ? MatrixF(all_up.middleRows(first, sizes.rank).transpose())
                        : matrix(Role::kv_b_weight, layer_idx, part);
    if (has(Role::kv_b_bias, layer_idx, part) && !matrix(Role::kv_b_bias, layer_idx, part).isZero(0)) {
      const std::string& name = name_of(Role::kv_b_bias, layer_idx, part);
      fail_input({checkpoint_.file_of(name).path(), name, "holds a bias", "zeros", "other numbers",
                  "latent attention here has none on its up-projections"});
    }
    branch.up *= static_cast<float>(geometry.latent_scale);
    const Index step = out.nope_dim + out.v_dim;
    for (Index h = 0; h < branch.head_count && geometry.branch_scale != 1; ++h) {
      branch.up.middleRows(h * step + out.nope_dim, out.v_dim) *= static_cast<float>(geometry.branch_scale);
    }
    first += sizes.rank;
    out.branches.push_back(std::move(branch));
  }
  out.rotary_key = rows(first, out.rope_dim);
}

void Model::read_branches(Index layer_idx, LatentAttention& out) const {
  const LatentGeometry& geometry = *config_.latent;
  out.rotary_key = linear(Role::k_rope_weight, Role::k_rope_bias, layer_idx);
  if (geometry.norm == LatentNorm::replicated) {
    out.norm_rows = matrix(Role::kv_norm_weight, layer_idx);
    out.norm_eps = static_cast<float>(geometry.norm_eps);
  }
  for (std::size_t s = 0; s < geometry.shared_ranks.size(); ++s) {
    out.shared.push_back(
        linear(Role::kv_shared_weight, Role::kv_shared_bias, layer_idx, static_cast<Index>(s)));
  }
  for (std::size_t b = 0; b < geometry.branches.size(); ++b) {
    const auto part = static_cast<Index>(b);
    const BranchGeometry& sizes = geometry.branches[b];
    LatentBranch branch;
    branch.down = linear(Role::kv_a_weight, Role::kv_a_bias, layer_idx, part);
    branch.shared = sizes.shared;
    branch.norm = {vector_or_empty(Role::kv_a_norm, layer_idx, part), static_cast<float>(geometry.norm_eps)};
    branch.up = matrix(Role::kv_b_weight, layer_idx, part);
    branch.first_head = sizes.first_head;
    branch.head_count = sizes.head_count;
    out.branches.push_back(std::move(branch));
  }
}

Attention Model::attention(Index layer_idx) const {
  if (config_.gqa) {
    return gqa(layer_idx);
  }
  return latent(layer_idx);
}

Mlp Model::mlp(Index layer_idx) const {
  if (config_.has_experts(layer_idx)) {
    return {{matrix(Role::shared_gate_weight, layer_idx), {}},
            {matrix(Role::shared_up_weight, layer_idx), {}},
            {matrix(Role::shared_down_weight, layer_idx), {}}};
  }
  Mlp out;
  for (const Projection& projection : projections_of(out)) {
    *projection.into = linear(projection.weight, projection.bias, layer_idx);
  }
  return out;
}

Experts Model::experts(Index layer_idx) const {
  return {*config_.experts, matrix(Role::router_weight, layer_idx),
          vector_or_empty(Role::router_bias, layer_idx), [this, layer_idx](Index expert) -> Mlp {
            return {{matrix(Role::expert_gate_weight, layer_idx, expert), {}},
                    {matrix(Role::expert_up_weight, layer_idx, expert), {}},
                    {matrix(Role::expert_down_weight, layer_idx, expert), {}}};
          }};
}

template <typename Projections>
void Model::pack_projections(const Projections& projections, Index layer_idx, Work& work) const {
  for (const Projection& from : projections) {
    work.emplace_back([this, layer_idx, from] { *from.into = packed(from.weight, from.bias, layer_idx); });
  }
}

MlpHalf Model::mlp_half(Index layer_idx) const {
  MlpHalf out{norm(Role::post_attention_norm, layer_idx), mlp(layer_idx), std::nullopt};
  if (config_.has_experts(layer_idx)) {
    out.experts = experts(layer_idx);
  }
  return out;
}

void Model::pack_mlp(Index layer_idx, MlpHalf& out, Work& work) const {
  out.post_attention_norm = norm(Role::post_attention_norm, layer_idx);
  if (!config_.has_experts(layer_idx)) {
    pack_projections(projections_of(out.mlp), layer_idx, work);
    return;
  }
  out.mlp = mlp(layer_idx);
  out.experts = experts(layer_idx);
  for (Linear* linear : {&out.mlp.gate, &out.mlp.up, &out.mlp.down}) {
    work.emplace_back([linear] { linear->pack(); });
  }
}

MlpHalf Model::packed_mlp_half(Index layer_idx) const {
  MlpHalf out;
  Work work;
  pack_mlp(layer_idx, out, work);
  parallel_for(work.size(), [&](std::size_t i) { work[i](); });
  return out;
}

Layer Model::packed_layer(Index layer_idx) const {
  Layer out;
  out.input_norm = norm(Role::input_norm, layer_idx);
  // Largest first, so that threads end together.
  Work work;
  pack_mlp(layer_idx, out, work);
  if (config_.gqa) {
    pack_projections(projections_of(out.attention.emplace<GqaAttention>(gqa_geometry())), layer_idx, work);
  } else {
    auto& latent = out.attention.emplace<LatentAttention>(this->latent(layer_idx));
    for (Linear* linear : {&latent.q, &latent.o, &latent.q_down}) {
      if (linear->out() > 0) {
        work.emplace_back([linear] { linear->pack(); });
      }
    }
  }
  parallel_for(work.size(), [&](std::size_t i) { work[i](); });
  return out;
}

MatrixF Model::embed(const std::vector<std::int32_t>& ids) const {
  const Stage stage("read weights");
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
  const Stage stage("read weights");
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
