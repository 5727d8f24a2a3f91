// Sizes of the latents and the rotary key, from options and config.
#pragma once

#include <optional>
#include <string>

#include "convert/latent/lay_out.h"
#include "convert/latent/lossless.h"
#include "convert/model/model.h"
#include "convert/plan/inputs.h"
#include "convert/plan/options.h"

namespace relatent {

// Extra latent coordinates for engines that normalise the latent.
inline constexpr Index default_norm_coordinates = 2;

// Elements per token and layer that a budget leaves. Throws Error (usage) unless it lies in (0, 1].
Index budget_elements(double budget, const ModelConfig& config);

// Of these, what each latent of a grouped-query source stores for the layout and not for a head to read: the
// constant one, or what steadies the norm.
Index layout_elements(const ConvertOptions& options, const ConvertInputs& inputs);

// The options with what the engine's layout decides of the sizes: the rank and the rotary key of a shape that
// kernels have, the frequencies of a fixed base, the rank of a layout that has one size only. Throws Error
// (usage) when they contradict each other.
ConvertOptions with_engine_sizes(const ConvertOptions& options, const ConvertInputs& inputs);

// Coordinates of the latent that the queries of every converted layer pass, whatever the other sizes; none =
// they pass none.
std::optional<Index> query_rank(const ConvertOptions& options, const ConvertInputs& inputs);

// Whether rotary frequencies lie in a geometric list, each once: asked for, or all that the engine has.
bool has_plain_list(const ConvertOptions& options, const Engine& engine);

// Keys and values that the heads of a group read, as numbers per token: all that a latent can hold of them.
// Of the group whose heads read least.
Index readable_rank(const Partition& partition, Index heads, const GqaGeometry& gqa);

// What the converted layers of --method lossless take. Reads the keys and values of every layer.
LosslessSizes lossless_sizes(const ConvertInputs& inputs);

// The shape of every converted layer. lossless: of --method lossless of a grouped-query source. Throws Error
// (usage) naming the option that does not fit.
LatentShape choose_shape(const ConvertOptions& options, const ConvertInputs& inputs,
                         const std::optional<LosslessSizes>& lossless = {});

// Sizes that were asked for and that no kernel of a serving engine has, in a sentence; else empty.
std::string unserved_shape(const ConvertOptions& options, const EngineTraits& traits);

}  // namespace relatent
