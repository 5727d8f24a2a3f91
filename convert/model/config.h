// What config.json says, in one form for every family.
#pragma once

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

// Grouped-query attention: num_attention_heads queries share num_key_value_heads keys and values of size
// head_dim.
struct GqaGeometry {
  Index num_key_value_heads = 0;
  Index head_dim = 0;
  QkNorm qk_norm = QkNorm::none;
  bool attention_bias = false;  // of families that say it in the config
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

// Mixture-of-experts MLPs, DeepSeek's kind, in every layer from first_layer on.
struct ExpertsGeometry {
  Index first_layer = 0;
  Index count = 0;              // experts that a token may be sent to
  Index shared = 0;             // experts that every token passes, stored as one MLP
  Index intermediate_size = 0;  // of one expert
  Index per_token = 0;
  TopkMethod topk_method = TopkMethod::greedy;
  Index groups = 1;            // equal runs of experts
  Index groups_per_token = 1;  // groups that a token's experts may come from
  bool normalised = false;     // a token's scores are divided by their sum
  double scale = 1;            // of what a token's experts add
};

// How the attention of one layer scores.
struct AttentionSpec {
  float scale = 0;  // of q·k before the softmax
  // A query sees at most this many positions, its own included; none = all.
  std::optional<Index> window{};
};

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
  bool tie_word_embeddings = false;
  std::vector<AttentionSpec> attention;  // one for each layer
  DType dtype = DType::f32;              // what config.json says the weights are
  Rotary rotary;                         // over head_dim (GQA) or qk_rope_head_dim (MLA)
  std::optional<GqaGeometry> gqa;
  std::optional<LatentGeometry> latent;
  std::optional<ExpertsGeometry> experts;  // none = every MLP is dense
  // Layers behind the last that predict further tokens; a checkpoint may hold them or not.
  Index prediction_layers = 0;

  bool has_experts(Index layer_idx) const { return experts && layer_idx >= experts->first_layer; }
  // Elements kept per token and layer: 2 K d for GQA, r + p for latents.
  Index cache_elements() const;
  // Cache bytes per token over all layers, at the config's dtype.
  Index cache_bytes_per_token() const {
    return cache_elements() * num_hidden_layers * static_cast<Index>(size_of(dtype));
  }
  // The same on that one of tp tensor-parallel devices that holds most; nothing when tp devices cannot share
  // the attention (devices.h). GQA splits (and then repeats) its heads.
  std::optional<Index> cache_bytes_per_token_on_device(Index tp) const;
};

// Throws Error (input) naming config.json, the key, what was expected and found: unknown model_type, missing
// keys, sizes that do not fit together, an activation other than silu, quantised weights.
ModelConfig parse_config(const nlohmann::ordered_json& config, const std::filesystem::path& config_path);

}  // namespace relatent
