// The families relatent reads: one file each in this folder, and their list in registry.cc.
// docs/adding-a-family.md says how to add one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "convert/model/attention.h"
#include "convert/model/config.h"
#include "convert/model/config_reader.h"
#include "convert/model/layer_reader.h"
#include "convert/model/tensor_rule.h"

namespace relatent {

// A tensor that holds the rows of several others, one after another.
struct FusedTensor {
  std::string_view name;  // "{i}" stands for the layer index
  struct Piece {
    std::string_view name;  // as the rules have it
    Index (*rows)(const ModelConfig&);
  };
  std::vector<Piece> pieces;
};

// What a family is good for.
enum class FamilyUse {
  source,  // checkpoints that are converted
  result,  // layouts that conversions write, which are read to be looked at, verified and sharded
};

struct Family {
  std::string_view name;        // no two families have the same
  std::string_view model_type;  // of config.json
  // Some borrow the model_type of another family: a key of config.json that only they have. Empty: none.
  std::string_view key;
  // What the config says, in the model's terms. Family and model_type are filled in before. Throws Error
  // (input) naming the key.
  void (*parse)(const ConfigReader& in, ModelConfig& out);
  std::vector<TensorRule> rules;
  // A layer's latent attention from its tensors; nullptr where there are no such layers. Grouped-query
  // attention is read by its roles.
  LatentAttention (*read_latent)(const LayerReader& in) = nullptr;
  // In every layer of every checkpoint; a rule has the pieces, not these.
  std::vector<FusedTensor> fused{};
  // For people: models of this kind, and what they have beside Llama's parts.
  std::string_view models{};
  std::string_view features{};
  FamilyUse use = FamilyUse::source;
};

// In the order in which they are listed for people.
const std::vector<const Family*>& families();

// The family of a config; of those with its model_type the one whose key it has. Throws Error (input) when
// there is none.
const Family& family_of(const ConfigReader& in);

// nullptr when there is none of that name.
const Family* find_family(std::string_view name);

// "llama, mistral, ..."
std::string known_families();

// One file each.
const Family& llama_family();
const Family& mistral_family();
const Family& qwen2_family();
const Family& qwen3_family();
const Family& deepseek_v2_family();
const Family& deepseek_v3_family();
const Family& relatent_family();
const Family& mlra_family();
const Family& gla_family();
const Family& gguf_deepseek2_family();
const Family& seed_oss_family();
const Family& mixtral_family();
const Family& qwen2_moe_family();
const Family& qwen3_moe_family();
const Family& gemma2_family();
const Family& gemma3_family();
const Family& phi3_family();
const Family& glm4_family();
const Family& granite_family();
const Family& olmo2_family();
const Family& smollm3_family();

}  // namespace relatent
