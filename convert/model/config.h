// What config.json says, in one form for every family.
#pragma once

#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "convert/model/latent_sizes.h"
#include "convert/model/rotary.h"
#include "linalg/dtype.h"

namespace relatent {

// Tensor-parallel sizes that the cache is reported for.
inline constexpr std::array<Index, 4> reported_tp = {1, 2, 4, 8};
// Lengths of a sequence, in tokens, that the cache is reported for: windows bound it.
inline constexpr std::array<Index, 3> reported_contexts = {4096, 32768, 131072};
// Bytes of the cache at each of them.
using CacheByContext = std::array<Index, reported_contexts.size()>;
// Both by the length in tokens, as --json says them.
nlohmann::ordered_json context_json(const CacheByContext& source, const CacheByContext& converted);

// Grouped-query attention: num_attention_heads queries share num_key_value_heads keys and values of size
// head_dim.
struct GqaGeometry {
  Index num_key_value_heads = 0;
  Index head_dim = 0;
  QkNorm qk_norm = QkNorm::none;
  bool attention_bias = false;  // of families that say it in the config
  // How queries and keys lie in a checkpoint: the leading rotary_dim coordinates of a head rotate, as halves
  // or as pairs (2i, 2i + 1). Once read, pairs are halves of the whole head, and what does not rotate are
  // pairs of frequency 0 behind the others (head_layout.h).
  Index rotary_dim = 0;
  bool rope_interleave = false;
  // Biases on queries, keys and values, and on o_proj, where a config of the own layout says so; elsewhere
  // the family's rules do.
  bool qkv_bias = false;
  bool o_bias = false;

  bool operator==(const GqaGeometry&) const = default;
  // Elements kept per token and layer on each of tp devices, which split (and then repeat) the heads.
  Index cache_elements(Index tp = 1) const {
    return 2 * std::max<Index>(1, (num_key_value_heads + tp - 1) / tp) * head_dim;
  }
  // Key coordinates of all heads that rotate.
  Index rotating_keys() const { return num_key_value_heads * rotary_dim; }
};

// Latent attention as a config describes it.
struct LatentGeometry : LatentSizes {
  bool rope_interleave = true;  // rotary rows come as pairs (2i, 2i+1) rather than halves
  double norm_eps = 1e-6;       // of the norms on latents, the query's too
  // Fixed factors of a family's code: on a normalised latent, on a branch's output, on a query latent.
  double latent_scale = 1;
  double branch_scale = 1;
  double query_scale = 1;
};

// How a router chooses a token's experts, by DeepSeek's names.
enum class TopkMethod {
  greedy,                // those of the largest softmax score
  group_limited_greedy,  // likewise, in the groups whose best score is largest
  noaux_tc,  // sigmoid scores; the largest sum of score and bias, in the groups whose two best sum highest
};

// By the names of config.json.
inline constexpr std::array<std::pair<TopkMethod, std::string_view>, 3> topk_methods = {
    {{TopkMethod::greedy, "greedy"},
     {TopkMethod::group_limited_greedy, "group_limited_greedy"},
     {TopkMethod::noaux_tc, "noaux_tc"}}};
std::string_view topk_method_name(TopkMethod method);

// Mixture-of-experts MLPs, in every layer from first_layer on that dense_layers does not name.
struct ExpertsGeometry {
  Index first_layer = 0;
  std::vector<Index> dense_layers{};  // behind first_layer, ascending
  Index count = 0;                    // experts that a token may be sent to
  // The MLP that every token passes, however many experts it counts as: its intermediate size, 0 for none,
  // and whether what it adds is multiplied by the sigmoid of a row's product with the token.
  Index shared_size = 0;
  bool shared_gate = false;
  Index intermediate_size = 0;  // of one expert
  Index per_token = 0;
  TopkMethod topk_method = TopkMethod::greedy;
  Index groups = 1;            // equal runs of experts
  Index groups_per_token = 1;  // groups that a token's experts may come from
  bool normalised = false;     // a token's scores are divided by their sum
  double scale = 1;            // of what a token's experts add

  bool in_layer(Index layer_idx) const {
    return layer_idx >= first_layer &&
           !std::binary_search(dense_layers.begin(), dense_layers.end(), layer_idx);
  }
};

enum class AttentionKind { grouped_query, latent };

// The attention of one layer.
struct AttentionSpec {
  float scale = 0;  // of q·k before the softmax
  // A query sees at most this many positions, its own included; none = all.
  std::optional<Index> window{};
  AttentionKind kind = AttentionKind::grouped_query;
  std::optional<Index> rotary{};  // index into ModelConfig::other_rotaries; none = ModelConfig::rotary
};

// What an MLP puts its gate through.
enum class Activation { silu, gelu_tanh };
// By the names that transformers has for them.
inline constexpr std::array<std::pair<Activation, std::string_view>, 2> activations = {
    {{Activation::silu, "silu"}, {Activation::gelu_tanh, "gelu_pytorch_tanh"}}};
std::string_view activation_name(Activation activation);

// Which norms attention and MLP have: of what they read of the stream, of what they add to it, or of both.
enum class NormPlacement { before, both, behind };
inline constexpr std::array<std::pair<NormPlacement, std::string_view>, 3> norm_placements = {
    {{NormPlacement::before, "before"}, {NormPlacement::both, "both"}, {NormPlacement::behind, "behind"}}};
std::string_view norm_placement_name(NormPlacement placement);

struct Family;
struct ModelConfig;
// Whether queries and keys of grouped-query attention are normalised.
bool normalises_keys(const ModelConfig& config);

struct ModelConfig {
  const Family* family = nullptr;  // families/family.h
  std::string model_type;          // as config.json says it
  Index hidden_size = 0;
  Index num_hidden_layers = 0;
  Index num_attention_heads = 0;
  Index intermediate_size = 0;
  Index vocab_size = 0;
  Index max_position_embeddings = 0;
  double rms_norm_eps = 0;
  // By Granite's names: what attention and MLPs add to the stream is multiplied, logits are divided.
  double residual_multiplier = 1;
  double logits_scaling = 1;
  bool tie_word_embeddings = false;
  std::vector<AttentionSpec> attention;  // one for each layer
  DType dtype = DType::f32;              // what config.json says the weights are
  // Over qk_rope_head_dim of the latent layers, or head_dim where there are none; of every layer that names
  // no other.
  Rotary rotary;
  std::vector<Rotary> other_rotaries;
  std::optional<GqaGeometry> gqa;          // of the grouped-query layers, where there are some
  std::optional<LatentGeometry> latent;    // of the latent layers
  std::optional<ExpertsGeometry> experts;  // none = every MLP is dense
  // Layers behind the last that predict further tokens; a checkpoint may hold them or not.
  Index prediction_layers = 0;

  Activation activation = Activation::silu;  // of the MLPs
  NormPlacement norms = NormPlacement::before;
  bool norm_unit_offset = false;    // every norm but those on latents multiplies by 1 + its weight
  double embedding_multiplier = 1;  // of the embeddings, in the weights' dtype
  // Numbers x become cap tanh(x / cap): scores after their scale, and logits; none = they do not.
  std::optional<double> attn_logit_softcapping;
  std::optional<double> final_logit_softcapping;

  const AttentionSpec& spec(Index layer_idx) const { return attention[static_cast<std::size_t>(layer_idx)]; }
  bool is_latent(Index layer_idx) const { return spec(layer_idx).kind == AttentionKind::latent; }
  const Rotary& rotary_of(Index layer_idx) const {
    const std::optional<Index> other = spec(layer_idx).rotary;
    return other ? other_rotaries[static_cast<std::size_t>(*other)] : rotary;
  }
  // The list by which layers rotate that have one in common: of the first of them that does.
  const Rotary& shared_rotary(const LayerSet& layers) const;
  // Whether some pair of its heads rotates.
  bool rotates(Index layer_idx) const { return rotary_of(layer_idx).rotating_pairs() > 0; }
  bool has_experts(Index layer_idx) const { return experts && experts->in_layer(layer_idx); }
  // Layers with experts.
  Index expert_layers() const;
  // Whether the layer sees less than the model's longest sequence, so that its cache is bounded.
  bool is_sliding(Index layer_idx) const {
    const std::optional<Index> window = spec(layer_idx).window;
    return window && *window < max_position_embeddings;
  }
  LayerSet sliding_layers() const;
  LayerSet still_layers() const;  // those that do not rotate

  // Elements kept per token and layer: r + p of the latent layers, or where there are none 2 K d.
  Index cache_elements() const;
  Index cache_elements(Index layer_idx) const;
  // Bytes that a token leaves in the cache over all layers, at the config's dtype, as long as no window is
  // full.
  Index cache_bytes_per_token() const { return cache_bytes(1); }
  // Tokens that a layer keeps of a sequence of so many: no more than its window.
  Index cached_tokens(Index layer_idx, Index context) const;
  // Bytes of the cache of one sequence of so many tokens.
  Index cache_bytes(Index context) const;
  CacheByContext cache_by_context() const;
  // The same on that one of tp tensor-parallel devices that holds most; nothing when tp devices cannot share
  // the attention (devices.h). Grouped-query layers split (and then repeat) their heads.
  std::optional<Index> cache_bytes_on_device(Index tp, Index context) const;
  std::optional<Index> cache_bytes_per_token_on_device(Index tp) const {
    return cache_bytes_on_device(tp, 1);
  }
};

// Throws Error (input) naming config.json, the key, what was expected and found: unknown model_type, missing
// keys, sizes that do not fit together, an activation other than silu, quantised weights.
ModelConfig parse_config(const nlohmann::ordered_json& config, const std::filesystem::path& config_path);

}  // namespace relatent
