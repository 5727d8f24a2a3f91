// Parts of a config that several families spell alike.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "convert/model/config.h"
#include "convert/model/config_reader.h"

namespace relatent {

// What every config.json says in the same words: intermediate_size, vocab_size, dtype, and what is refused of
// hidden_act and quantization_config.
void parse_shared_keys(const ConfigReader& in, ModelConfig& out);

// The same and sizes by Llama's names: hidden_size, num_hidden_layers, ..., tie_word_embeddings.
void parse_body(const ConfigReader& in, ModelConfig& out);

// head_dim; where the config says nothing `otherwise`, or hidden_size / num_attention_heads.
Index parse_head_dim(const ConfigReader& in, const ModelConfig& config, std::optional<Index> otherwise = {});

// Complains about keys that are true: "false, as every published <model> has it".
void refuse_flags(const ConfigReader& in, const std::vector<const char*>& keys, const std::string& model);

// Complains about num_key_value_heads that num_attention_heads is no multiple of.
void check_key_value_heads(const ConfigReader& in, Index num_key_value_heads, Index num_attention_heads);

// embedding_multiplier, residual_multiplier and logits_scaling, by Granite's names; 1 where the config says
// nothing.
void parse_multipliers(const ConfigReader& in, ModelConfig& out);

// What a family's class in transformers takes where a config says nothing of sliding windows.
struct WindowDefaults {
  std::optional<Index> window{};       // without a key sliding_window; null there always says none
  bool used = true;                    // use_sliding_window
  bool by_type = false;                // knows layer_types, which decide where they are given
  std::optional<Index> first_layer{};  // max_window_layers, from which on layers slide; none = no such key
  Index full_every = 0;                // else every so many-th layer sees all positions; 0 = none does
};
// Of Qwen2 and Qwen3.
inline constexpr WindowDefaults qwen_windows = {
    .window = 4096, .used = false, .by_type = true, .first_layer = 28};

// Heads that may rotate in part: partial_rotary_factor where the config says nothing, and whether pairs lie
// side by side.
struct PartialRotary {
  double factor = 1;
  bool interleave = false;
};

// A grouped-query model by Llama's names, and what its family takes where the config says nothing: a head_dim
// as parse_head_dim has it, windows, and the part of a head that rotates (none = always all of it).
struct GroupedQueryDefaults {
  std::optional<Index> head_dim{};
  WindowDefaults windows{};
  std::optional<PartialRotary> partial_rotary{};
  bool tie_word_embeddings = false;
};
void parse_grouped_query(const ConfigReader& in, const GroupedQueryDefaults& defaults, ModelConfig& out);
inline void parse_grouped_query(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, {}, out);
}

// These layers of a grouped-query model do not rotate: ascending, not all.
void set_still_layers(const std::vector<Index>& layers, ModelConfig& out);
// no_rope_layers: 1 for each layer that rotates and 0 for the others, of which the ascending list is
// returned. Complains about a list that is shorter than num_hidden_layers or has other numbers, and where
// none rotates.
std::vector<Index> parse_still_layers(const ConfigReader& in, Index num_hidden_layers);

// The config with these rope_parameters in place of what it says of them, in newer or older keys.
nlohmann::ordered_json with_rope_parameters(const ConfigReader& in, const nlohmann::ordered_json& parameters);

// Latent attention by DeepSeek's names, without its branches. Fills in the layers' score scale, (n + p)^-1/2
// times YaRN's mscale squared.
LatentGeometry parse_latent(const ConfigReader& in, ModelConfig& out);

// Every layer's scores are multiplied by `factor` (n + p)^-1/2.
void set_latent_scale(const LatentGeometry& latent, double factor, ModelConfig& out);

// Equal, normalised latents: of `parts` branches for every of `groups` groups of heads, numbered group by
// group.
void even_branches(Index heads, Index groups, Index parts, LatentGeometry& latent);

// Experts by DeepSeek's names, in every layer from first_k_dense_replace on; nothing where that covers all
// layers.
struct ExpertDefaults {
  std::optional<TopkMethod> topk_method{};  // where the config names none; none = it must
  bool sigmoid_only = false;                // topk_method must, or must not, be noaux_tc
  bool softmax_only = false;
  bool normalised = false;       // norm_topk_prob where the config says nothing
  bool shared_optional = false;  // n_shared_experts may be 0
};
std::optional<ExpertsGeometry> parse_experts(const ConfigReader& in, Index num_hidden_layers,
                                             const ExpertDefaults& defaults);

// Experts by Qwen's names, without shared ones: softmax scores, a layer of every decoder_sparse_step, but
// those of mlp_only_layers; nothing where that leaves none.
std::optional<ExpertsGeometry> parse_qwen_experts(const ConfigReader& in, Index num_hidden_layers);

// Complains about scoring_func where it says another function than softmax.
void check_softmax_router(const ConfigReader& in);
// Complains where tokens are sent to more experts than they may.
void check_experts_per_token(const ConfigReader& in, const ExpertsGeometry& experts);

// A list of layers from `first` up to, and without, `last`: ascending, each once; empty where there is no
// such key.
std::vector<Index> parse_layer_list(const ConfigReader& in, const char* key, Index first, Index last);

}  // namespace relatent
