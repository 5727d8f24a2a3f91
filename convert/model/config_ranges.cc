#include "convert/model/config_ranges.h"

#include <algorithm>
#include <array>
#include <utility>

namespace relatent {
namespace {

// Together they keep the elements of any tensor, and the bytes of a cache, far below 2^63.
constexpr Index usual = Index{1} << 20;   // of hidden and intermediate sizes and ranks
constexpr Index head_count = 1 << 14;     // published: up to 128
constexpr Index head_size = 1 << 16;      // up to 256; a rotary key that many heads share is larger
constexpr Index expert_count = 1 << 16;   // up to 512
constexpr Index layer_count = 4096;       // up to 126; what is kept for each layer stays small
constexpr Index int32_most = 2147483647;  // token ids are int32, and engines count positions so

// In the words of every family; a size of no other key here is a usual one.
constexpr std::array<std::pair<std::string_view, Index>, 36> sizes = {
    {{"num_hidden_layers", layer_count},
     {"n_layer", layer_count},
     {"deepseek2.block_count", layer_count},
     {"max_window_layers", layer_count},
     {"sliding_window_pattern", layer_count},
     {"_sliding_window_pattern", layer_count},
     {"num_nextn_predict_layers", layer_count},
     {"num_mtp_layers", layer_count},
     {"decoder_sparse_step", layer_count},
     {"num_attention_heads", head_count},
     {"num_key_value_heads", head_count},
     {"n_head", head_count},
     {"deepseek2.attention.head_count", head_count},
     {"first_head", head_count},
     {"num_heads", head_count},
     {"head_dim", head_size},
     {"qk_nope_head_dim", head_size},
     {"qk_rope_head_dim", head_size},
     {"qk_rope_dim", head_size},
     {"v_head_dim", head_size},
     {"deepseek2.rope.dimension_count", head_size},
     {"deepseek2.attention.key_length_mla", head_size},
     {"deepseek2.attention.value_length_mla", head_size},
     {"n_routed_experts", expert_count},
     {"num_experts", expert_count},
     {"num_local_experts", expert_count},
     {"n_shared_experts", expert_count},
     {"num_experts_per_tok", expert_count},
     {"n_group", expert_count},
     {"topk_group", expert_count},
     {"vocab_size", int32_most},
     {"deepseek2.vocab_size", int32_most},
     {"max_position_embeddings", int32_most},
     {"block_size", int32_most},
     {"deepseek2.context_length", int32_most},
     {"sliding_window", int32_most}}};

// Kernels work in float32: what is smaller than 1e-38 there is zero, what is larger than 3e38 infinite.
constexpr NumberRange norm_eps = {1e-30, 0.1};  // published: 1e-6 to 1e-5
constexpr NumberRange rope_base = {1, 1e20};    // up to 5e10; 1 where the frequencies are a list
constexpr NumberRange rope_turns = {1e-3, 1e6};

constexpr std::array<std::pair<std::string_view, NumberRange>, 23> numbers = {
    {{"rms_norm_eps", norm_eps},
     {"query_pre_attn_scalar", {1e-3, 1e6}},    // 64 to 256
     {"scaling", {1e-6, 1e3}},                  // 1/16 to 1
     {"embedding_multiplier", {1e-3, 1e4}},     // up to 73
     {"attn_logit_softcapping", {1e-1, 1e6}},   // 50
     {"final_logit_softcapping", {1e-1, 1e6}},  // 30
     {"deepseek2.attention.layer_norm_rms_epsilon", norm_eps},
     {"routed_scaling_factor", {1e-3, 1e3}},  // 1 to 16
     {"rope_theta", rope_base},
     {"rope_local_base_freq", rope_base},
     {"deepseek2.rope.freq_base", rope_base},
     {"factor", {1, 1e6}},  // 2 to 64; transformers warns below 1
     {"attention_factor", {1e-3, 1e3}},
     {"mscale", {0, 100}},  // 0.707 or 1; 0 says that there is none
     {"mscale_all_dim", {0, 100}},
     {"beta_fast", rope_turns},         // 32
     {"beta_slow", rope_turns},         // 1
     {"low_freq_factor", rope_turns},   // 1
     {"high_freq_factor", rope_turns},  // 4
     {"original_max_position_embeddings", {1, int32_most}},
     {"partial_rotary_factor", {1e-3, 1}},  // 0.25 to 0.75
     {"residual_multiplier", {1e-3, 1e3}},  // 0.22
     {"logits_scaling", {1e-3, 1e3}}}};     // 1 to 16

template <typename Table, typename Value>
Value look_up(const Table& table, std::string_view key, Value otherwise) {
  const auto* const found =
      std::find_if(table.begin(), table.end(), [&](const auto& entry) { return entry.first == key; });
  return found == table.end() ? otherwise : found->second;
}

}  // namespace

Index largest_size(std::string_view key) {
  return look_up(sizes, key, usual);
}

NumberRange number_range(std::string_view key) {
  return look_up(numbers, key, any_finite);
}

}  // namespace relatent
