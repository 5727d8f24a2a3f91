#include "convert/model/config.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "convert/model/config_reader.h"
#include "convert/model/devices.h"
#include "convert/model/families/family.h"
#include "formats/error.h"

namespace relatent {
namespace {

constexpr std::array<std::pair<LatentNorm, std::string_view>, 3> norms = {
    {{LatentNorm::none, "none"}, {LatentNorm::branch, "branch"}, {LatentNorm::replicated, "replicated"}}};

constexpr std::array<std::pair<QkNorm, std::string_view>, 3> qk_norms = {
    {{QkNorm::none, "none"}, {QkNorm::head, "head"}, {QkNorm::width, "width"}}};

template <typename Value, typename Table>
std::optional<Value> value_in(const Table& table, std::string_view name) {
  const auto* known =
      std::find_if(table.begin(), table.end(), [&](const auto& named) { return named.second == name; });
  return known == table.end() ? std::nullopt : std::optional<Value>(known->first);
}

template <typename Table, typename Value>
std::string_view name_in(const Table& table, Value value) {
  for (const auto& [known, name] : table) {
    if (known == value) {
      return name;
    }
  }
  return "";
}

template <typename Holds>
LayerSet layers_where(Index count, const Holds& holds) {
  std::vector<Index> out;
  for (Index i = 0; i < count; ++i) {
    if (holds(i)) {
      out.push_back(i);
    }
  }
  return LayerSet(std::move(out));
}

}  // namespace

std::string_view norm_name(LatentNorm norm) {
  return name_in(norms, norm);
}

std::optional<LatentNorm> latent_norm_of(std::string_view name) {
  return value_in<LatentNorm>(norms, name);
}

std::string_view qk_norm_name(QkNorm norm) {
  return name_in(qk_norms, norm);
}

std::optional<QkNorm> qk_norm_of(std::string_view name) {
  return value_in<QkNorm>(qk_norms, name);
}

std::string_view topk_method_name(TopkMethod method) {
  return name_in(topk_methods, method);
}

Index ModelConfig::expert_layers() const {
  return experts ? num_hidden_layers - experts->first_layer - static_cast<Index>(experts->dense_layers.size())
                 : 0;
}

std::string_view activation_name(Activation activation) {
  return name_in(activations, activation);
}

bool normalises_keys(const ModelConfig& config) {
  return config.gqa && config.gqa->qk_norm != QkNorm::none;
}

std::string_view norm_placement_name(NormPlacement placement) {
  return name_in(norm_placements, placement);
}

LayerSet ModelConfig::sliding_layers() const {
  return layers_where(num_hidden_layers, [this](Index i) { return is_sliding(i); });
}

const Rotary& ModelConfig::shared_rotary(const LayerSet& layers) const {
  const std::vector<Index>& all = layers.layers();
  const auto found = std::find_if(all.begin(), all.end(), [this](Index i) { return rotates(i); });
  return rotary_of(found == all.end() ? all.front() : *found);
}

LayerSet ModelConfig::still_layers() const {
  return layers_where(num_hidden_layers, [this](Index i) { return !rotates(i); });
}

Index ModelConfig::cache_elements() const {
  return latent ? latent->cache_elements() : gqa->cache_elements();
}

Index ModelConfig::cache_elements(Index layer_idx) const {
  return is_latent(layer_idx) ? latent->cache_elements() : gqa->cache_elements();
}

Index ModelConfig::cached_tokens(Index layer_idx, Index context) const {
  return std::min(context, spec(layer_idx).window.value_or(context));
}

Index ModelConfig::cache_bytes(Index context) const {
  Index elements = 0;
  for (Index i = 0; i < num_hidden_layers; ++i) {
    elements += cache_elements(i) * cached_tokens(i, context);
  }
  return elements * static_cast<Index>(size_of(dtype));
}

CacheByContext ModelConfig::cache_by_context() const {
  CacheByContext out{};
  std::transform(reported_contexts.begin(), reported_contexts.end(), out.begin(),
                 [this](Index context) { return cache_bytes(context); });
  return out;
}

nlohmann::ordered_json context_json(const CacheByContext& source, const CacheByContext& converted) {
  nlohmann::ordered_json out;
  for (std::size_t i = 0; i < reported_contexts.size(); ++i) {
    out[std::to_string(reported_contexts[i])] = {{"source", source[i]}, {"converted", converted[i]}};
  }
  return out;
}

std::optional<Index> ModelConfig::cache_bytes_on_device(Index tp, Index context) const {
  // Of one token in a layer of either kind.
  const Index grouped_query = gqa ? gqa->cache_elements(tp) : 0;
  Index latents = 0;
  if (latent) {
    if (!why_not_shared(*latent, tp).empty()) {
      return std::nullopt;
    }
    for (const DeviceShare& share : device_shares(*latent, tp)) {
      latents = std::max(latents, share.cache_elements(*latent));
    }
  }
  Index elements = 0;
  for (Index i = 0; i < num_hidden_layers; ++i) {
    elements += (is_latent(i) ? latents : grouped_query) * cached_tokens(i, context);
  }
  return elements * static_cast<Index>(size_of(dtype));
}

ModelConfig parse_config(const nlohmann::ordered_json& config, const std::filesystem::path& config_path) {
  const ConfigReader in(config, config_path);
  ModelConfig out;
  out.family = &family_of(in);
  out.model_type = out.family->model_type;
  out.family->parse(in, out);
  return out;
}

}  // namespace relatent
