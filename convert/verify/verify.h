// Source against converted, both read from their files and run side by side.
#pragma once

#include <array>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "convert/compute/statistics.h"
#include "convert/model/layer_progress.h"
#include "convert/model/model.h"
#include "formats/npy.h"

namespace relatent {

struct LayerFidelity {
  double attention_rel_error =
      0;  // ‖attention output difference‖ / ‖source attention output‖, o_proj included
  double residual_rel_error = 0;  // the same of the residual stream after the layer
};

struct Verification {
  LogitComparison logits;
  double source_ppl = 0;
  double converted_ppl = 0;
  double nats = 0;               // ln(converted_ppl / source_ppl)
  Index source_cache_bytes = 0;  // per token, all layers, as long as no window is full
  Index converted_cache_bytes = 0;
  CacheByContext source_context_bytes{};  // of one sequence
  CacheByContext converted_context_bytes{};
  // On the device that holds most; nothing where so many devices cannot share the attention.
  std::array<std::optional<Index>, reported_tp.size()> source_per_device{};
  std::array<std::optional<Index>, reported_tp.size()> converted_per_device{};
  std::vector<LayerFidelity> layers;
};

// For each of the runs, whose layers are loaded once for all of them. Throws Error (input) when the two
// models differ in hidden size, layer count or vocabulary.
std::vector<Verification> verify(const Model& source, const Model& converted,
                                 const std::vector<Sequences>& runs, const LayerProgress& progress = {});
// For a single one.
Verification verify(const Model& source, const Model& converted, const Sequences& sequences,
                    const LayerProgress& progress);

// The converted model against itself, as tp devices run it: each has its share of every latent layer's
// weights and cache (devices.h), and their outputs are summed. Grouped-query layers are run whole.
struct DeviceVerification {
  Index tp = 0;
  LogitComparison logits;                    // whole against by devices
  std::vector<Index> cache_bytes_per_token;  // of each device, all layers
};

// Throws Error (usage) when the model has no latents, or tp devices cannot share it (saying why).
DeviceVerification verify_devices(const Model& converted, const Sequences& sequences, Index tp,
                                  const LayerProgress& progress);

// A list of objects with both errors of every layer.
nlohmann::ordered_json to_json(const std::vector<LayerFidelity>& layers);
// The fields of `verify --json`.
nlohmann::ordered_json to_json(const Verification& verification);
nlohmann::ordered_json to_json(const DeviceVerification& verification);

}  // namespace relatent
