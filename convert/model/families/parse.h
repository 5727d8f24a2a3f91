// Parts of a config that several families spell alike.
#pragma once

#include <optional>

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

// A grouped-query model by Llama's names, its sliding window (sliding_window, use_sliding_window) included.
// head_dim: where the config says nothing, as parse_head_dim has it.
void parse_grouped_query(const ConfigReader& in, ModelConfig& out, std::optional<Index> head_dim);
inline void parse_grouped_query(const ConfigReader& in, ModelConfig& out) {
  parse_grouped_query(in, out, std::nullopt);
}

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
  std::optional<TopkMethod> topk_method;  // where the config names none; none = it must
  bool sigmoid_only = false;              // topk_method must, or must not, be noaux_tc
  bool softmax_only = false;
  bool normalised = false;  // norm_topk_prob where the config says nothing
};
std::optional<ExpertsGeometry> parse_experts(const ConfigReader& in, Index num_hidden_layers,
                                             const ExpertDefaults& defaults);

}  // namespace relatent
