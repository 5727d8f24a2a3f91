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

bool normalises_keys(const ModelConfig& config) {
  return config.gqa && config.gqa->qk_norm != QkNorm::none;
}

Index ModelConfig::cache_elements() const {
  return gqa ? 2 * gqa->num_key_value_heads * gqa->head_dim : latent->kv_lora_rank + latent->qk_rope_head_dim;
}

std::optional<Index> ModelConfig::cache_bytes_per_token_on_device(Index tp) const {
  const Index unit = num_hidden_layers * static_cast<Index>(size_of(dtype));
  if (gqa) {
    const Index heads_here = std::max<Index>(1, (gqa->num_key_value_heads + tp - 1) / tp);
    return 2 * heads_here * gqa->head_dim * unit;
  }
  if (!why_not_shared(*latent, tp).empty()) {
    return std::nullopt;
  }
  Index most = 0;
  for (const DeviceShare& share : device_shares(*latent, tp)) {
    most = std::max(most, share.cache_elements(*latent));
  }
  return most * unit;
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
