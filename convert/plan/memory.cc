#include "convert/plan/memory.h"

#include <algorithm>

#include "convert/compute/backend.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

constexpr std::uint64_t memory_at_once = std::uint64_t{3} << 30U;

// Numbers that latents and rotary keys read.
Index latent_inputs(const ModelConfig& config, const LatentShape& shape) {
  return shape.normed_heads ? shape.normed_heads->inputs() : config.hidden_size;
}

}  // namespace

std::uint64_t layer_memory(const ModelConfig& config, const LatentShape& shape, bool moments, bool absorbed,
                           std::uint64_t output_values) {
  const auto hidden = static_cast<std::uint64_t>(config.hidden_size);
  const auto inputs = static_cast<std::uint64_t>(latent_inputs(config, shape)) + 1;
  const auto count = static_cast<std::uint64_t>(config.num_attention_heads);
  const auto head_dim = static_cast<std::uint64_t>(
      config.gqa ? config.gqa->head_dim : shape.qk_nope_head_dim + shape.qk_rope_head_dim);
  const auto heads = count * head_dim;
  const auto keys = config.gqa ? static_cast<std::uint64_t>(config.gqa->num_key_value_heads) * head_dim
                               : static_cast<std::uint64_t>(config.latent->kv_lora_rank);
  const bool joint = shape.qk_nope_head_dim > 0;
  // Maps as the source has them and as they are written, and the tensor that is being encoded.
  std::uint64_t out = 8 * (heads + keys) * inputs + 6 * output_values;
  // Keys and values once by themselves and twice together, and what is formed between them, in float64.
  out += joint ? 48 * keys * inputs + 200 * keys * keys : 16 * keys * (inputs + keys);
  if (moments) {
    out += (joint ? 24 : 8) * inputs * inputs;
  }
  if (shape.normed_heads) {
    out += 4 * (heads + 2 * keys) * hidden;
  }
  if (absorbed) {
    const auto width = static_cast<std::uint64_t>(shape.qk_rope_head_dim + shape.kv_lora_rank);
    out += 8 * (count * width + heads) * inputs;
  }
  return out;
}

std::uint64_t fit_memory(const ModelConfig& config, const LatentShape& shape, const SampleSize& size,
                         bool output_fit) {
  const Index inputs = latent_inputs(config, shape) + 1;
  const Index width = shape.qk_rope_head_dim + shape.kv_lora_rank;
  const Index head_dim = config.gqa ? config.gqa->head_dim : shape.qk_nope_head_dim + shape.qk_rope_head_dim;
  const Index heads = config.num_attention_heads * head_dim;
  const Index numbers = config.num_attention_heads * width + 2 * heads + 2 * inputs;
  const Index asking = shape.normed_heads ? head_dim + 1 : inputs;
  std::uint64_t largest = backend().query_fit_bytes(config.num_attention_heads, width, asking, size);
  if (output_fit) {
    largest = std::max(largest,
                       backend().output_fit_bytes(config.num_attention_heads, width, {inputs, asking}, size));
  }
  return static_cast<std::uint64_t>(8 * numbers * inputs) + largest;
}

std::uint64_t streams_memory(const ModelConfig& config, const Sequences& sequences, Index stride,
                             Index width) {
  const Index heads = config.num_attention_heads;
  const Index tokens = sequences.count * sequences.length;
  const Index queries = tokens / stride;
  const auto weights = static_cast<std::uint64_t>(queries * heads * sequences.length / 2) * sizeof(float);
  // Queries, keys and values of the source, and the head outputs of the converted layer.
  Index query = 0;
  Index key = 0;
  Index mixed = 0;
  Index asking = config.hidden_size;  // what the converted queries act on
  if (config.gqa) {
    query = heads * config.gqa->head_dim;
    key = 2 * config.gqa->num_key_value_heads * config.gqa->head_dim;
    mixed = query;
    asking = normalises_keys(config) ? query + heads + key : asking;
  } else {
    key = 2 * (config.latent->kv_lora_rank + config.latent->qk_rope_head_dim);
    query = heads * key / 2;
    mixed = heads * config.latent->v_head_dim;
    asking = config.latent->q_lora_rank.value_or(asking);
  }
  const Index numbers = tokens * (2 * config.hidden_size + mixed + key + width) +
                        queries * (2 * config.hidden_size + asking + query);
  return static_cast<std::uint64_t>(numbers) * sizeof(float) + (weights <= kept_weight_bytes ? weights : 0);
}

std::uint64_t streams_disk(const ModelConfig& config, const Sequences& sequences) {
  return 4 * sizeof(float) * static_cast<std::uint64_t>(sequences.count * sequences.length) *
         static_cast<std::uint64_t>(config.hidden_size);
}

Index layers_at_once(std::uint64_t bytes_per_layer) {
  const std::uint64_t fit = memory_at_once / std::max<std::uint64_t>(1, bytes_per_layer);
  return std::clamp<Index>(static_cast<Index>(fit), 1, std::max(1, num_threads()));
}

}  // namespace relatent
