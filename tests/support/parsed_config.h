// What config.json comes to.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>

#include "convert/model/config.h"

namespace relatent::testing_support {

inline ModelConfig parse(const nlohmann::ordered_json& config) {
  return parse_config(config, "folder/config.json");
}

// What the scores are multiplied by beyond (n + p)^-1/2.
inline float score_factor(const ModelConfig& config) {
  const LatentGeometry& latent = *config.latent;
  return config.attention.front().scale *
         std::sqrt(static_cast<float>(latent.qk_nope_head_dim + latent.qk_rope_head_dim));
}

}  // namespace relatent::testing_support
