// What each tensor-parallel rank holds of a model's tensors, as data.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "convert/model/model.h"
#include "convert/model/placement.h"
#include "convert/shard/manifest.h"

namespace relatent {

// Who has a tensor, or which of equal units of it.
enum class HeldBy {
  every,                // all ranks, the whole tensor
  first,                // rank 0, the whole tensor: what is added once to the ranks' sum, or never read
  vocabulary,           // a range of tokens, as even as can be
  intermediate,         // an equal range of intermediate_size
  expert_intermediate,  // an equal range of the intermediate size of every expert
  shared_intermediate,  // an equal range of the shared experts' intermediate size
  heads,                // the query heads of the rank
  kv_heads,             // the key/value heads that the rank's query heads read
  latent,               // ranks that have the latent, the whole tensor
  latent_heads,         // ranks that have the latent, the heads of it that they have
  shared_latent,        // ranks that have a latent that reads these shared coordinates, the whole tensor
};

struct ShardRule {
  Role role;
  HeldBy held_by;
  Split split;
};

// Names and forms that one reader of shards expects.
struct ShardLayout {
  std::string_view name;
  std::vector<ShardRule> rules;  // one for each role
};

const ShardLayout* find_shard_layout(std::string_view name);  // nullptr when unknown
std::string known_shard_layouts();                            // "plain"

// Why tp ranks cannot share the model, as a clause; empty when they can. Latents as why_not_shared
// (devices.h) has it. Query heads and the intermediate sizes of MLPs, experts and shared experts must divide
// by tp; tp must divide the key/value heads, or be a multiple of them, which are repeated then.
std::string why_not_sharded(const ModelConfig& config, Index tp);

// Every tensor of the model in the order of its files and data. Throws Error: usage with why_not_sharded's
// clause, input when one projection holds several latents.
std::vector<ShardedTensor> sharded_tensors(const Model& model, const ShardLayout& layout, Index tp);

}  // namespace relatent
