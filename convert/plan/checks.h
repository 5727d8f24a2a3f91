// What is refused before any size is chosen.
#pragma once

#include <string>

#include "convert/model/model.h"
#include "convert/plan/inputs.h"
#include "convert/plan/options.h"

namespace relatent {

// Throws Error (input) when the source holds something that no latent layout has a place for, by name.
void check_source(const Model& source);

// The source is MLA and becomes MLA of the same sizes, its norm included, in the engine's layout.
bool only_relays_out(const ConvertOptions& options, const ConvertInputs& inputs);

// Throws Error when the engine cannot hold the source or what is asked for, whatever the sizes: usage, or
// input where the source is to blame.
void check_engine(const ConvertOptions& options, const ConvertInputs& inputs);

}  // namespace relatent
