// Which layers of a source are converted.
#pragma once

#include <string>

#include "convert/model/layer_set.h"
#include "convert/model/model.h"

namespace relatent {

// The layers that stay as they are. wanted: as ConvertOptions::layers. Throws Error (usage, input) when it
// names none or layers that there are not, a layer whose window bounds its cache already, layers that rotate
// by different lists of frequencies or none that rotates, or some layers of an MLA source; and when no layer
// is left to convert.
LayerSet carried_layers(const std::string& wanted, const Model& source);

}  // namespace relatent
