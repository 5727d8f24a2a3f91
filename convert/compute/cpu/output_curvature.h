// How the output of a layer curves with its queries and its key map.
#pragma once

#include <vector>

#include "convert/compute/cpu/fit_blocks.h"
#include "convert/compute/cpu/output_layer.h"

namespace relatent {

// For each head, then for the key map, from a part of the sampled queries; they only weigh and precondition.
std::vector<ScoreSide> output_curvature(const OutputLayer& layer);

}  // namespace relatent
