// How layers of latent attention are read, as families share it.
#pragma once

#include "convert/model/attention.h"
#include "convert/model/layer_reader.h"

namespace relatent {

// One projection holds the rows of every latent and then the rotary key's (DeepSeek, and the MLRA and GLA
// authors). Up-projections: one for each latent, all of them in one tensor, input-major, or that of a single
// latent in two halves.
LatentAttention read_joint_latents(const LayerReader& in);

// Every map in a tensor of its own (engines/relatent.h).
LatentAttention read_branches(const LayerReader& in);

}  // namespace relatent
