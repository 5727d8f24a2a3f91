// What is refused before any size is chosen.
#pragma once

#include <string>

#include "convert/model/model.h"
#include "convert/plan/options.h"

namespace relatent {

// Throws Error (input) when the source holds something that no latent layout has a place for, by name.
void check_source(const Model& source);

// Throws Error when the engine cannot hold the source or what is asked for, whatever the sizes: usage, or
// input where the source is to blame.
void check_engine(const ConvertOptions& options, const Model& source, const EngineTraits& traits);

}  // namespace relatent
