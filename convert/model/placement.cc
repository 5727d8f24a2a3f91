#include "convert/model/placement.h"

#include <algorithm>
#include <set>
#include <string_view>

#include "convert/model/families/family.h"
#include "formats/error.h"
#include "formats/safetensors.h"

namespace relatent {
namespace {

std::string with_indices(std::string_view pattern, std::optional<Index> layer_idx,
                         std::optional<Index> part) {
  std::string out(pattern);
  const auto put = [&](const char* mark, Index index) {
    const std::size_t at = out.find(mark);
    if (at != std::string::npos) {
      out.replace(at, 3, std::to_string(index));
    }
  };
  if (layer_idx) {
    put("{i}", *layer_idx);
  }
  if (part) {
    put("{b}", *part);
    put("{c}", *part + 1);
  }
  return out;
}

std::string list_names(const std::set<std::string>& names) {
  constexpr std::size_t shown = 12;
  std::string out;
  std::size_t n = 0;
  for (const std::string& name : names) {
    if (n == shown) {
      return out + " and " + std::to_string(names.size() - shown) + " more";
    }
    out += (n++ == 0 ? "" : ", ") + name;
  }
  return out;
}

// The scales beside FP8 weights, named before their many weights are.
void refuse_fp8(const TensorSource& source, const std::set<std::string>& names) {
  const auto scale =
      std::find_if(names.begin(), names.end(), [](const auto& name) { return name.ends_with("_scale_inv"); });
  if (scale != names.end()) {
    fail_input({source.path_of(*scale), *scale, "holds scales of FP8 weights", "weights in BF16, F16 or F32",
                "quantised ones", "cast them to bfloat16 first, as DeepSeek's fp8_cast_bf16.py does"});
  }
}

// Moves the tensors of layers that predict further tokens from one to the other.
void place_prediction_layers(const ModelConfig& config, std::set<std::string>& unplaced,
                             std::vector<PlacedTensor>& placed) {
  for (Index i = 0; i < config.prediction_layers; ++i) {
    const Index layer_idx = config.num_hidden_layers + i;
    const std::string prefix = "model.layers." + std::to_string(layer_idx) + ".";
    auto at = unplaced.lower_bound(prefix);
    while (at != unplaced.end() && at->starts_with(prefix)) {
      placed.push_back({*at, Role::prediction, layer_idx});
      at = unplaced.erase(at);
    }
  }
}

// Whether a rule holds in a layer; for a tensor outside the layers any layer_idx will do.
bool holds_in(const TensorRule& rule, const ModelConfig& config, Index layer_idx) {
  const bool mlp =
      rule.layers == InLayers::all || config.has_experts(layer_idx) == (rule.layers == InLayers::experts);
  return mlp && (rule.attention == WithAttention::any ||
                 config.is_latent(layer_idx) == (rule.attention == WithAttention::latent));
}

// Adds the tensors of rules [first, last), which come part by part.
void add_expected(const std::vector<TensorRule>& rules, std::size_t first, std::size_t last,
                  const ModelConfig& config, std::vector<ExpectedTensor>& out) {
  const TensorRule& leading = rules[first];
  const bool in_layer = leading.name.find("{i}") != std::string_view::npos;
  const Index layers = in_layer ? config.num_hidden_layers : 1;
  for (Index layer = 0; layer < layers; ++layer) {
    const std::optional<Index> layer_idx = in_layer ? std::optional(layer) : std::nullopt;
    if (!holds_in(leading, config, layer)) {
      continue;
    }
    const Index parts = leading.parts != nullptr ? leading.parts(config) : 1;
    for (Index at = 0; at < parts; ++at) {
      const std::optional<Index> part = leading.parts != nullptr ? std::optional(at) : std::nullopt;
      for (std::size_t r = first; r < last; ++r) {
        const Presence presence = rules[r].presence(config);
        if (presence != Presence::absent) {
          const std::vector<Index> shape = rules[r].shape(config, at);
          out.push_back({{with_indices(rules[r].name, layer_idx, part), rules[r].role, layer_idx, part},
                         presence,
                         {shape.begin(), shape.end()}});
        }
      }
    }
  }
}

// How many tensors expected_tensors() would list.
Index expected_count(const ModelConfig& config) {
  Index out = 0;
  for (const TensorRule& rule : config.family->rules) {
    if (rule.presence(config) == Presence::absent) {
      continue;
    }
    const Index parts = rule.parts != nullptr ? rule.parts(config) : 1;
    const Index layers = rule.name.find("{i}") != std::string_view::npos ? config.num_hidden_layers : 1;
    for (Index layer = 0; layer < layers; ++layer) {
      out += holds_in(rule, config, layer) ? parts : 0;
    }
  }
  return out;
}

// Layers times experts may ask for a thousand million tensors: too many to list before one is found missing.
void refuse_far_too_many(const TensorSource& source, const ModelConfig& config, std::size_t stored) {
  constexpr Index most_listed = 200000;
  const Index asked = expected_count(config);
  if (asked - static_cast<Index>(stored) > most_listed) {
    const std::string experts =
        config.experts ? " of " + std::to_string(config.experts->count) + " experts" : "";
    fail_input(
        {source.config_path(), "", "asks for more tensors than there are",
         "no more than the " + std::to_string(stored) + " that are stored",
         std::to_string(asked) + " for " + std::to_string(config.num_hidden_layers) + " layers" + experts,
         "compare with what the authors of the model published"});
  }
}

}  // namespace

bool is_attention(Role role) {
  return role >= Role::q_weight && role <= Role::kv_shared_bias;
}

std::optional<Role> source_role(Role role) {
  switch (role) {
    case Role::normed_q_weight:
      return Role::q_weight;
    case Role::normed_q_bias:
      return Role::q_bias;
    case Role::normed_k_weight:
      return Role::k_weight;
    case Role::normed_k_bias:
      return Role::k_bias;
    case Role::normed_v_weight:
      return Role::v_weight;
    case Role::normed_v_bias:
      return Role::v_bias;
    case Role::q_head_norm:
    case Role::k_head_norm:
      return role;
    default:
      return is_attention(role) ? std::nullopt : std::optional(role);
  }
}

std::vector<ExpectedTensor> expected_tensors(const ModelConfig& config) {
  const std::vector<TensorRule>& rules = config.family->rules;
  std::vector<ExpectedTensor> out;
  for (std::size_t first = 0; first < rules.size();) {
    std::size_t last = first + 1;
    while (last < rules.size() && rules[last].beside_previous) {
      ++last;
    }
    add_expected(rules, first, last, config, out);
    first = last;
  }
  return out;
}

std::vector<ExpectedTensor> stored_tensors(const ModelConfig& config) {
  std::vector<ExpectedTensor> out = expected_tensors(config);
  for (const FusedTensor& fused : config.family->fused) {
    for (Index layer_idx = 0; layer_idx < config.num_hidden_layers; ++layer_idx) {
      const auto is_named = [layer_idx](std::string_view pattern) {
        return
            [name = with_indices(pattern, layer_idx, {})](const ExpectedTensor& t) { return t.name == name; };
      };
      const auto whole = std::find_if(out.begin(), out.end(), is_named(fused.pieces.front().name));
      whole->name = with_indices(fused.name, layer_idx, {});
      whole->shape.front() = 0;
      for (const auto& [name, rows] : fused.pieces) {
        whole->shape.front() += rows(config);
      }
      for (const auto& [name, rows] : fused.pieces) {
        std::erase_if(out, is_named(name));
      }
    }
  }
  return out;
}

void cut_fused_tensors(const ModelConfig& config, Checkpoint& checkpoint) {
  for (const FusedTensor& fused : config.family->fused) {
    for (Index layer_idx = 0; layer_idx < config.num_hidden_layers; ++layer_idx) {
      std::vector<std::pair<std::string, std::int64_t>> pieces;
      for (const auto& [name, rows] : fused.pieces) {
        pieces.emplace_back(with_indices(name, layer_idx, {}), rows(config));
      }
      checkpoint.cut_rows(with_indices(fused.name, layer_idx, {}), pieces);
    }
  }
}

std::vector<PlacedTensor> place_tensors(const TensorSource& source, const ModelConfig& config) {
  std::set<std::string> unplaced;
  for (std::string& name : source.tensor_names()) {
    unplaced.insert(std::move(name));
  }
  refuse_fp8(source, unplaced);
  refuse_far_too_many(source, config, unplaced.size());
  std::set<std::string> missing;
  std::vector<PlacedTensor> placed;
  for (const ExpectedTensor& expected : expected_tensors(config)) {
    if (unplaced.erase(expected.name) == 0) {
      if (expected.presence == Presence::required) {
        missing.insert(expected.name);
      }
      continue;
    }
    const TensorInfo& info = source.info(expected.name);
    if (info.shape != expected.shape) {
      fail_input({source.path_of(expected.name), expected.name, "shape",
                  shape_text(expected.shape) + " by " + source.config_path().filename().string(),
                  shape_text(info.shape), ""});
    }
    if (!is_float(info.dtype)) {
      fail_input({source.path_of(expected.name), expected.name, "dtype", "BF16, F16, F32 or F64",
                  std::string(safetensors_name(info.dtype)), ""});
    }
    placed.push_back(expected);
  }
  place_prediction_layers(config, unplaced, placed);
  const std::string model = "a " + std::string(config.family->name) + " model";
  if (!unplaced.empty()) {
    fail_input(
        {source.path(), "", "tensors that have no place in " + model, "none", list_names(unplaced), ""});
  }
  if (!missing.empty()) {
    fail_input({source.path(), "", "tensors that " + model + " needs are missing", list_names(missing),
                "no tensors of these names", ""});
  }
  return placed;
}

}  // namespace relatent
