#include "convert/shard/layout.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "convert/model/devices.h"
#include "convert/model/families/family.h"
#include "formats/error.h"

namespace relatent {
namespace {

const std::vector<ShardLayout>& layouts() {
  static const std::vector<ShardLayout> all = {
      // The checkpoint's own names; every rank's tensors are contiguous slices.
      {"plain",
       {
           {Role::embed_tokens, HeldBy::vocabulary, Split::rows},
           {Role::final_norm, HeldBy::every, Split::whole},
           {Role::lm_head, HeldBy::vocabulary, Split::rows},
           {Role::input_norm, HeldBy::every, Split::whole},
           {Role::post_attention_norm, HeldBy::every, Split::whole},
           {Role::attention_output_norm, HeldBy::every, Split::whole},
           {Role::mlp_output_norm, HeldBy::every, Split::whole},
           {Role::q_weight, HeldBy::heads, Split::rows},
           {Role::q_bias, HeldBy::heads, Split::rows},
           {Role::k_weight, HeldBy::kv_heads, Split::rows},
           {Role::k_bias, HeldBy::kv_heads, Split::rows},
           {Role::v_weight, HeldBy::kv_heads, Split::rows},
           {Role::v_bias, HeldBy::kv_heads, Split::rows},
           {Role::o_weight, HeldBy::heads, Split::columns},
           {Role::o_bias, HeldBy::first, Split::whole},
           {Role::q_head_norm, HeldBy::every, Split::whole},
           {Role::k_head_norm, HeldBy::every, Split::whole},
           {Role::normed_q_weight, HeldBy::heads, Split::rows},
           {Role::normed_q_bias, HeldBy::heads, Split::rows},
           {Role::normed_k_weight, HeldBy::every, Split::whole},
           {Role::normed_k_bias, HeldBy::every, Split::whole},
           {Role::normed_v_weight, HeldBy::every, Split::whole},
           {Role::normed_v_bias, HeldBy::every, Split::whole},
           {Role::q_a_weight, HeldBy::every, Split::whole},
           {Role::q_a_bias, HeldBy::every, Split::whole},
           {Role::q_a_norm, HeldBy::every, Split::whole},
           {Role::kv_a_weight, HeldBy::latent, Split::whole},
           {Role::kv_a_bias, HeldBy::latent, Split::whole},
           {Role::kv_a_norm, HeldBy::latent, Split::whole},
           {Role::kv_b_weight, HeldBy::latent_heads, Split::rows},
           {Role::kv_b_bias, HeldBy::latent_heads, Split::rows},
           {Role::k_b_weight, HeldBy::latent_heads, Split::rows},
           {Role::v_b_weight, HeldBy::latent_heads, Split::rows},
           {Role::k_rope_weight, HeldBy::every, Split::whole},
           {Role::k_rope_bias, HeldBy::every, Split::whole},
           {Role::kv_norm_weight, HeldBy::every, Split::whole},
           {Role::kv_shared_weight, HeldBy::shared_latent, Split::whole},
           {Role::kv_shared_bias, HeldBy::shared_latent, Split::whole},
           {Role::gate_weight, HeldBy::intermediate, Split::rows},
           {Role::gate_bias, HeldBy::intermediate, Split::rows},
           {Role::up_weight, HeldBy::intermediate, Split::rows},
           {Role::up_bias, HeldBy::intermediate, Split::rows},
           {Role::down_weight, HeldBy::intermediate, Split::columns},
           {Role::down_bias, HeldBy::first, Split::whole},
           {Role::router_weight, HeldBy::every, Split::whole},
           {Role::router_bias, HeldBy::every, Split::whole},
           {Role::expert_gate_weight, HeldBy::expert_intermediate, Split::rows},
           {Role::expert_up_weight, HeldBy::expert_intermediate, Split::rows},
           {Role::expert_down_weight, HeldBy::expert_intermediate, Split::columns},
           {Role::shared_gate_weight, HeldBy::shared_intermediate, Split::rows},
           {Role::shared_up_weight, HeldBy::shared_intermediate, Split::rows},
           {Role::shared_down_weight, HeldBy::shared_intermediate, Split::columns},
           {Role::shared_expert_gate, HeldBy::every, Split::whole},
           {Role::prediction, HeldBy::first, Split::whole},
           {Role::inv_freq, HeldBy::every, Split::whole},
       }},
  };
  return all;
}

// Units first ... first + count - 1 of `all` equal ones that a dimension consists of.
struct Units {
  Index first = 0;
  Index count = 1;
  Index all = 1;
};

// What decides a rank's parts.
struct Rank {
  Index index = 0;
  Index tp = 1;
  Units heads;  // of grouped-query layers
  Units kv_heads;
  DeviceShare share;  // of latent layers
};

Units equal_part(Index rank, Index tp, Index all) {
  return {rank * (all / tp), all / tp, all};
}

std::vector<Rank> ranks_of(const ModelConfig& config, Index tp) {
  const Index heads = config.num_attention_heads;
  std::vector<DeviceShare> shares(static_cast<std::size_t>(tp));
  if (config.latent) {
    shares = device_shares(*config.latent, tp);
  }
  std::vector<Rank> out;
  for (Index k = 0; k < tp; ++k) {
    Rank rank{.index = k,
              .tp = tp,
              .heads = {},
              .kv_heads = {},
              .share = std::move(shares[static_cast<std::size_t>(k)])};
    if (config.gqa) {
      const Index kv_heads = config.gqa->num_key_value_heads;
      rank.heads = equal_part(k, tp, heads);
      rank.kv_heads = tp <= kv_heads ? equal_part(k, tp, kv_heads) : Units{k / (tp / kv_heads), 1, kv_heads};
    }
    out.push_back(std::move(rank));
  }
  return out;
}

// What a rank has of a tensor that belongs to one of the latents; no `part` where there is only one.
std::optional<Units> latent_units(const ModelConfig& config, const Rank& rank, std::optional<Index> part,
                                  bool heads) {
  const Index latent = part.value_or(0);
  const auto has = std::find_if(rank.share.branches.begin(), rank.share.branches.end(),
                                [&](const BranchShare& share) { return share.branch == latent; });
  if (has == rank.share.branches.end()) {
    return std::nullopt;
  }
  if (!heads) {
    return Units{};
  }
  const BranchGeometry& whole = config.latent->branches[static_cast<std::size_t>(latent)];
  return Units{has->first_head - whole.first_head, has->head_count, whole.head_count};
}

std::optional<Units> units_of(HeldBy held_by, const ModelConfig& config, const Rank& rank,
                              const PlacedTensor& place) {
  const std::optional<Index> part = place.part;
  switch (held_by) {
    case HeldBy::every:
      return Units{};
    case HeldBy::first:
      return rank.index == 0 ? std::optional(Units{}) : std::nullopt;
    case HeldBy::vocabulary: {
      const Index first = rank.index * config.vocab_size / rank.tp;
      return Units{first, (rank.index + 1) * config.vocab_size / rank.tp - first, config.vocab_size};
    }
    case HeldBy::intermediate:
      return equal_part(rank.index, rank.tp, config.intermediate_size);
    case HeldBy::expert_intermediate:
      return equal_part(rank.index, rank.tp, config.experts->intermediate_size);
    case HeldBy::shared_intermediate:
      return equal_part(rank.index, rank.tp, config.experts->shared_size);
    case HeldBy::heads:
      return config.is_latent(*place.layer_idx)
                 ? Units{rank.share.first_head, rank.share.head_count, config.num_attention_heads}
                 : rank.heads;
    case HeldBy::kv_heads:
      return rank.kv_heads;
    case HeldBy::latent:
    case HeldBy::latent_heads:
      return latent_units(config, rank, part, held_by == HeldBy::latent_heads);
    case HeldBy::shared_latent: {
      const std::vector<Index>& shared = rank.share.shared;
      return std::find(shared.begin(), shared.end(), part) != shared.end() ? std::optional(Units{})
                                                                           : std::nullopt;
    }
  }
  return std::nullopt;
}

// Pieces that are cut out of one tensor have no file of their own.
void check_no_fused_tensors(const Model& model) {
  const Family& family = *model.config().family;
  if (!family.fused.empty()) {
    fail_input({model.checkpoint().path(), "", "model_type", "a layout with a tensor for each projection",
                std::string(family.name), "convert it first, and shard the result"});
  }
}

// Rows of several latents in one tensor are no contiguous slices.
void check_tensor_per_latent(const Model& model) {
  const ModelConfig& config = model.config();
  if (!config.latent || config.latent->branches.size() == 1) {
    return;
  }
  for (const PlacedTensor& tensor : model.tensors()) {
    if (tensor.role == Role::kv_a_weight && !tensor.part) {
      fail_input({model.checkpoint().config_path(), "", "model_type",
                  "a layout with tensors for each latent, such as convert --engine relatent writes",
                  std::string(config.family->name), "all latents are in " + tensor.name});
    }
  }
}

std::string does_not_divide(const char* what, Index size, Index tp) {
  return std::string(what) + " " + std::to_string(size) + " does not divide by " + std::to_string(tp);
}

}  // namespace

const ShardLayout* find_shard_layout(std::string_view name) {
  const auto found = std::find_if(layouts().begin(), layouts().end(),
                                  [&](const ShardLayout& layout) { return layout.name == name; });
  return found == layouts().end() ? nullptr : &*found;
}

std::string known_shard_layouts() {
  std::string out;
  for (const ShardLayout& layout : layouts()) {
    out += (out.empty() ? "" : ", ") + std::string(layout.name);
  }
  return out;
}

std::string why_not_sharded(const ModelConfig& config, Index tp) {
  if (tp < 1 || tp > kMostRanks) {
    return "there must be 1 to " + std::to_string(kMostRanks) + " ranks";
  }
  if (config.gqa) {
    const Index kv_heads = config.gqa->num_key_value_heads;
    if (config.num_attention_heads % tp != 0) {
      return does_not_divide("num_attention_heads", config.num_attention_heads, tp);
    }
    if (tp <= kv_heads && kv_heads % tp != 0) {
      return does_not_divide("num_key_value_heads", kv_heads, tp);
    }
    if (tp > kv_heads && tp % kv_heads != 0) {
      return std::to_string(tp) + " ranks are not a multiple of num_key_value_heads " +
             std::to_string(kv_heads);
    }
  }
  if (config.latent) {
    if (std::string reason = why_not_shared(*config.latent, tp); !reason.empty()) {
      return reason;
    }
  }
  if (config.experts && config.experts->intermediate_size % tp != 0) {
    return does_not_divide("the experts' intermediate size", config.experts->intermediate_size, tp);
  }
  if (config.experts && config.experts->shared_size % tp != 0) {
    return does_not_divide("the shared experts' intermediate size", config.experts->shared_size, tp);
  }
  // Where every layer has experts, nothing has this size.
  const bool dense = !config.experts || config.expert_layers() != config.num_hidden_layers;
  return config.intermediate_size % tp == 0 || !dense
             ? ""
             : does_not_divide("intermediate_size", config.intermediate_size, tp);
}

std::vector<ShardedTensor> sharded_tensors(const Model& model, const ShardLayout& layout, Index tp) {
  const ModelConfig& config = model.config();
  check_tensor_per_latent(model);
  check_no_fused_tensors(model);
  const std::string reason = why_not_sharded(config, tp);
  if (!reason.empty()) {
    fail_usage("--tp " + std::to_string(tp) + " does not fit this model: " + reason);
  }
  const std::vector<Rank> ranks = ranks_of(config, tp);
  std::map<std::string, PlacedTensor> placed;
  for (const PlacedTensor& tensor : model.tensors()) {
    placed.emplace(tensor.name, tensor);
  }
  std::vector<ShardedTensor> out;
  for (const SafetensorsFile& file : model.folder("sharded").files()) {
    for (const TensorInfo& info : file.tensors()) {
      const PlacedTensor& place = placed.at(info.name);
      const auto rule = std::find_if(layout.rules.begin(), layout.rules.end(),
                                     [&](const ShardRule& r) { return r.role == place.role; });
      if (rule == layout.rules.end()) {
        throw std::logic_error("the layout says nothing of tensor " + info.name);
      }
      ShardedTensor tensor{{info.name, info.dtype, info.shape}, rule->split, {}};
      const std::int64_t size = info.shape[tensor.axis()];
      for (const Rank& rank : ranks) {
        const std::optional<Units> units = units_of(rule->held_by, config, rank, place);
        const std::int64_t each = units ? size / units->all : 0;
        tensor.ranks.push_back(units ? std::optional(RankPart{units->first * each, units->count * each})
                                     : std::nullopt);
      }
      out.push_back(std::move(tensor));
    }
  }
  return out;
}

}  // namespace relatent
