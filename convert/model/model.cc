#include "convert/model/model.h"

#include <array>
#include <functional>
#include <nlohmann/json.hpp>
#include <utility>

#include "convert/model/families/family.h"
#include "convert/model/head_layout.h"
#include "formats/error.h"
#include "formats/gguf_source.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

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

// Of the MLP that every token passes; none where a layer has only experts that tokens are sent to.
std::vector<Projection> projections_of(Mlp& mlp, const ModelConfig& config, Index layer_idx) {
  if (!config.has_experts(layer_idx)) {
    return {{&mlp.gate, Role::gate_weight, Role::gate_bias},
            {&mlp.up, Role::up_weight, Role::up_bias},
            {&mlp.down, Role::down_weight, Role::down_bias}};
  }
  if (config.experts->shared_size == 0) {
    return {};
  }
  return {{&mlp.gate, Role::shared_gate_weight, Role::gate_bias},
          {&mlp.up, Role::shared_up_weight, Role::up_bias},
          {&mlp.down, Role::shared_down_weight, Role::down_bias}};
}

void multiply(float factor, Linear& linear) {
  if (factor != 1) {
    linear.weight *= factor;
    linear.bias *= factor;
  }
}

// What a projection's tensors are to the program.
void to_program(const ModelConfig& config, Role weight, Linear& linear) {
  const bool of_heads = weight == Role::q_weight || weight == Role::k_weight;
  if (of_heads && config.gqa && !has_plain_heads(*config.gqa)) {
    to_halves(*config.gqa, config.rotary.attention_factor, linear);
  }
  if (weight == Role::o_weight || weight == Role::down_weight) {
    multiply(static_cast<float>(config.residual_multiplier), linear);
  }
}

// Whether to_program leaves it as it is.
bool is_plain(const ModelConfig& config, Role weight) {
  const bool of_heads = weight == Role::q_weight || weight == Role::k_weight;
  const bool adds = weight == Role::o_weight || weight == Role::down_weight;
  return !(of_heads && config.gqa && !has_plain_heads(*config.gqa)) &&
         !(adds && config.residual_multiplier != 1);
}

Linear read_projection(const LayerReader& in, Role weight, Role bias) {
  Linear out = in.linear(weight, bias);
  to_program(in.config(), weight, out);
  return out;
}

// The same for products in bfloat16.
Linear packed_projection(const LayerReader& in, Role weight, Role bias) {
  if (is_plain(in.config(), weight)) {
    return in.packed(weight, bias);
  }
  Linear out = read_projection(in, weight, bias);
  out.pack();
  return out;
}

}  // namespace

Model::Model(std::unique_ptr<TensorSource> source, ModelConfig config)
    : source_(std::move(source)),
      config_(std::move(config)),
      tensors_(place_tensors(*source_, config_)),
      names_(tensors_) {}

Model Model::open(const std::filesystem::path& path, std::optional<Index> context) {
  const auto parse = [&](const TensorSource& source) {
    return context ? parse_config(with_longrope_list(source.config(), *context, source.config_path()),
                                  source.config_path())
                   : parse_config(source.config(), source.config_path());
  };
  if (GgufSource::is_one(path)) {
    auto source = std::make_unique<GgufSource>(GgufSource::open(path));
    ModelConfig config = parse(*source);
    return {std::move(source), std::move(config)};
  }
  auto source = std::make_unique<Checkpoint>(Checkpoint::open(path));
  ModelConfig config = parse(*source);
  cut_fused_tensors(config, *source);
  return {std::move(source), std::move(config)};
}

const Checkpoint& Model::folder(const std::string& purpose) const {
  const auto* folder = dynamic_cast<const Checkpoint*>(source_.get());
  if (folder == nullptr) {
    fail_usage(source_->path().string() + ": a single file is a result, which cannot be " + purpose +
               ": give the checkpoint folder that it was made from");
  }
  return *folder;
}

GqaAttention Model::gqa_geometry(Index layer_idx) const {
  const AttentionSpec& spec = config_.spec(layer_idx);
  GqaAttention out;
  out.heads = config_.num_attention_heads;
  out.kv_heads = config_.gqa->num_key_value_heads;
  out.head_dim = config_.gqa->head_dim;
  out.window = spec.window;
  out.scale = spec.scale;
  out.softcap = static_cast<float>(config_.attn_logit_softcapping.value_or(0));
  out.rotary = config_.rotary_of(layer_idx);
  if (config_.gqa->qk_norm != QkNorm::none) {
    out.q_norm = reader(layer_idx).norm(Role::q_head_norm);
    out.k_norm = reader(layer_idx).norm(Role::k_head_norm);
  }
  return out;
}

GqaAttention Model::scores(Index layer_idx) const {
  const LayerReader in = reader(layer_idx);
  GqaAttention out = gqa_geometry(layer_idx);
  out.q = read_projection(in, Role::q_weight, Role::q_bias);
  out.k = read_projection(in, Role::k_weight, Role::k_bias);
  return out;
}

GqaAttention Model::keys_and_values(Index layer_idx) const {
  const LayerReader in = reader(layer_idx);
  GqaAttention out = gqa_geometry(layer_idx);
  out.k = read_projection(in, Role::k_weight, Role::k_bias);
  out.v = read_projection(in, Role::v_weight, Role::v_bias);
  return out;
}

LatentAttention Model::latent(Index layer_idx) const {
  LatentAttention out = config_.family->read_latent(reader(layer_idx));
  to_program(config_, Role::o_weight, out.o);
  return out;
}

Attention Model::attention(Index layer_idx) const {
  const LayerReader in = reader(layer_idx);
  if (config_.is_latent(layer_idx)) {
    return latent(layer_idx);
  }
  GqaAttention out = gqa_geometry(layer_idx);
  for (const Projection& projection : projections_of(out)) {
    *projection.into = read_projection(in, projection.weight, projection.bias);
  }
  return out;
}

Mlp Model::mlp(Index layer_idx) const {
  const LayerReader in = reader(layer_idx);
  Mlp out;
  out.activation = config_.activation;
  for (const Projection& projection : projections_of(out, config_, layer_idx)) {
    *projection.into = read_projection(in, projection.weight, projection.bias);
  }
  return out;
}

Experts Model::experts(Index layer_idx, bool packed) const {
  const LayerReader in = reader(layer_idx);
  const auto projection = [in, packed](Role weight, Role bias, Index expert) {
    return packed ? in.packed(weight, bias, expert) : in.linear(weight, bias, expert);
  };
  return {*config_.experts, in.matrix(Role::router_weight), in.vector_or_empty(Role::router_bias),
          in.vector_or_empty(Role::shared_expert_gate), [projection, in](Index expert) -> Mlp {
            return {projection(Role::expert_gate_weight, Role::gate_bias, expert),
                    projection(Role::expert_up_weight, Role::up_bias, expert),
                    projection(Role::expert_down_weight, Role::down_bias, expert), in.config().activation};
          }};
}

template <typename Projections>
void Model::pack_projections(const Projections& projections, Index layer_idx, Work& work) const {
  for (const Projection& from : projections) {
    work.emplace_back([this, layer_idx, from] {
      *from.into = packed_projection(reader(layer_idx), from.weight, from.bias);
    });
  }
}

MlpHalf Model::mlp_half(Index layer_idx) const {
  const LayerReader in = reader(layer_idx);
  MlpHalf out{in.norm(Role::post_attention_norm), mlp(layer_idx), std::nullopt,
              in.norm(Role::mlp_output_norm)};
  if (config_.has_experts(layer_idx)) {
    out.experts = experts(layer_idx, false);
  }
  return out;
}

void Model::pack_mlp(Index layer_idx, MlpHalf& out, Work& work) const {
  out.post_attention_norm = reader(layer_idx).norm(Role::post_attention_norm);
  out.mlp_output_norm = reader(layer_idx).norm(Role::mlp_output_norm);
  out.mlp.activation = config_.activation;
  pack_projections(projections_of(out.mlp, config_, layer_idx), layer_idx, work);
  if (config_.has_experts(layer_idx)) {
    out.experts = experts(layer_idx, true);
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
  out.input_norm = input_norm(layer_idx);
  out.attention_output_norm = attention_output_norm(layer_idx);
  // Largest first, so that threads end together.
  Work work;
  pack_mlp(layer_idx, out, work);
  if (!config_.is_latent(layer_idx)) {
    pack_projections(projections_of(out.attention.emplace<GqaAttention>(gqa_geometry(layer_idx))), layer_idx,
                     work);
  } else {
    auto& attention = out.attention.emplace<LatentAttention>(latent(layer_idx));
    std::vector<Linear*> large = {&attention.o, &attention.q_down};
    if (attention.normed_heads) {
      NormedHeads& heads = *attention.normed_heads;
      large.insert(large.end(), {&heads.q, &heads.k, &heads.v});
    } else {
      large.push_back(&attention.q);
    }
    for (Linear* linear : large) {
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
  const std::string& name = name_of(Role::embed_tokens, {});
  const TensorInfo& info = source_->info(name);
  const std::span<const std::byte> bytes = source_->bytes(name);
  const std::size_t row_bytes = static_cast<std::size_t>(config_.hidden_size) * size_of(info.dtype);
  MatrixF out(static_cast<Index>(ids.size()), config_.hidden_size);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    decode_floats(info.dtype, bytes.subspan(static_cast<std::size_t>(ids[i]) * row_bytes, row_bytes),
                  {out.row(static_cast<Index>(i)).data(), static_cast<std::size_t>(config_.hidden_size)});
  }
  if (config_.embedding_multiplier != 1) {
    out *= static_cast<float>(config_.embedding_multiplier);
  }
  return out;
}

MatrixF Model::head_rows(Index first, Index count) const {
  const Stage stage("read weights");
  const std::string& name = name_of(
      has(Role::lm_head, {}) && !config_.tie_word_embeddings ? Role::lm_head : Role::embed_tokens, {});
  const TensorInfo& info = source_->info(name);
  const std::size_t row_bytes = static_cast<std::size_t>(config_.hidden_size) * size_of(info.dtype);
  MatrixF out(count, config_.hidden_size);
  decode_floats(info.dtype,
                source_->bytes(name).subspan(static_cast<std::size_t>(first) * row_bytes,
                                             static_cast<std::size_t>(count) * row_bytes),
                {out.data(), static_cast<std::size_t>(out.size())});
  if (config_.logits_scaling != 1) {
    out /= static_cast<float>(config_.logits_scaling);
  }
  return out;
}

}  // namespace relatent
