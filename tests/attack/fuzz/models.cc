#include "tests/attack/fuzz/models.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "convert/model/devices.h"
#include "convert/model/families/family.h"
#include "convert/model/placement.h"
#include "tests/attack/fuzz/fuzz.h"

namespace relatent::fuzz {
namespace {

// More tensors or numbers than it pays to list for one input.
constexpr Index kMost = 4096;

void touch_linear(const Linear& linear) {
  touch_dense(linear.weight);
  touch_dense(linear.bias);
}

void touch_attention(const GqaAttention& attention) {
  for (const Linear* linear : {&attention.q, &attention.k, &attention.v, &attention.o}) {
    touch_linear(*linear);
  }
}

void touch_attention(const LatentAttention& attention) {
  for (const Linear* linear : {&attention.q_down, &attention.q, &attention.rotary_key, &attention.o}) {
    touch_linear(*linear);
  }
  for (const Linear& linear : attention.shared) {
    touch_linear(linear);
  }
  touch_dense(attention.norm_rows);
  for (const LatentBranch& branch : attention.branches) {
    touch_linear(branch.down);
    touch_dense(branch.norm.gain);
    touch_dense(branch.up);
    require(branch.first_head >= 0 && branch.first_head + branch.head_count <= attention.heads,
            "a latent for heads that there are not");
  }
  require(attention.total_rank() > 0, "no latent at all");
}

void touch_mlp(const Mlp& mlp) {
  touch_linear(mlp.gate);
  touch_linear(mlp.up);
  touch_linear(mlp.down);
}

void touch_rotary(const Rotary& rotary, Index max_position_embeddings) {
  require(std::isfinite(rotary.attention_factor), "an attention factor that is no number");
  for (const float frequency : rotary.inv_freq) {
    require(std::isfinite(frequency) && frequency > 0, "a rotary frequency that is no positive number");
  }
  if (static_cast<Index>(rotary.inv_freq.size()) <= kMost) {
    touch_dense(RotaryTable(rotary, 3).cos);
    static_cast<void>(explicit_rope_parameters(rotary, max_position_embeddings));
    try {
      static_cast<void>(geometric_base(rotary));
    } catch (const std::invalid_argument&) {  // a list that is not geometric
    }
  }
}

}  // namespace

void touch_config(const ModelConfig& config) {
  require(config.family != nullptr && (config.gqa || config.latent), "no attention");
  require(config.attention.size() == static_cast<std::size_t>(config.num_hidden_layers),
          "layers without a scale");
  require(config.cache_elements() > 0 && config.cache_bytes_per_token() > 0, "an empty cache");
  for (Index i = 0; i < config.num_hidden_layers; ++i) {
    const float scale = config.spec(i).scale;
    require(std::isfinite(scale) && scale > 0, "a scale that is no positive number");
    require(config.is_latent(i) ? config.latent.has_value() : config.gqa.has_value(),
            "a layer of a kind without sizes");
    require(
        !config.spec(i).rotary || *config.spec(i).rotary < static_cast<Index>(config.other_rotaries.size()),
        "a layer without a list of rotary frequencies");
    require(config.spec(i).window.value_or(1) > 0, "an empty window");
  }
  for (const Index bytes : config.cache_by_context()) {
    require(bytes > 0, "an empty cache of a sequence");
  }
  for (const Index tp : reported_tp) {
    const std::optional<Index> bytes = config.cache_bytes_per_token_on_device(tp);
    require(!bytes || *bytes > 0, "an empty cache on a device");
    if (config.latent && why_not_shared(*config.latent, tp).empty()) {
      static_cast<void>(device_shares(*config.latent, tp));
    }
  }
  touch_rotary(config.rotary, config.max_position_embeddings);
  for (const Rotary& rotary : config.other_rotaries) {
    touch_rotary(rotary, config.max_position_embeddings);
  }
  Index tensors = config.num_hidden_layers * static_cast<Index>(config.family->rules.size());
  if (config.experts) {
    tensors *= config.experts->count;
  }
  if (config.latent) {
    tensors *= static_cast<Index>(config.latent->branches.size() + config.latent->shared_ranks.size());
  }
  if (tensors > kMost) {
    return;
  }
  for (const ExpectedTensor& tensor : expected_tensors(config)) {
    require(dense_bytes(config.dtype, tensor.shape).has_value(), "a tensor of no size: " + tensor.name);
    require(std::all_of(tensor.shape.begin(), tensor.shape.end(), [](std::int64_t size) { return size > 0; }),
            "an empty tensor: " + tensor.name);
  }
}

void touch_model(const Model& model) {
  const ModelConfig& config = model.config();
  const auto in_vocabulary = static_cast<std::int32_t>(config.vocab_size - 1);
  reads([&] { touch_dense(model.embed({0, in_vocabulary})); });
  reads([&] { touch_dense(model.head_rows(config.vocab_size - 1, 1)); });
  reads([&] { touch_dense(model.final_norm().gain); });
  reads([&] { touch(model.checkpoint().fingerprint()); });
  for (Index i = 0; i < std::min<Index>(config.num_hidden_layers, 8); ++i) {
    reads([&] {
      const AttentionHalf half = model.attention_half(i);
      touch_dense(half.input_norm.gain);
      touch_dense(half.attention_output_norm.gain);
      std::visit([](const auto& attention) { touch_attention(attention); }, half.attention);
    });
    reads([&] {
      const MlpHalf half = model.mlp_half(i);
      touch_dense(half.post_attention_norm.gain);
      touch_dense(half.mlp_output_norm.gain);
      touch_mlp(half.mlp);
      if (half.experts) {
        touch_dense(half.experts->router);
        touch_dense(half.experts->bias);
        touch_dense(half.experts->shared_gate);
        touch_mlp(half.experts->expert(0));
        touch_mlp(half.experts->expert(half.experts->geometry.count - 1));
      }
    });
  }
}

}  // namespace relatent::fuzz
