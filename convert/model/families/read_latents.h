// How layers of latent attention are read, as families share it.
#pragma once

#include "convert/model/attention.h"
#include "convert/model/layer_reader.h"

namespace relatent {

// One projection holds the rows of every latent and then the rotary key's (DeepSeek, and the MLRA and GLA
// authors). Up-projections: one for each latent, or all of them in one tensor, input-major.
LatentAttention read_joint_latents(const LayerReader& in);

// Every map in a tensor of its own (engines/relatent.h).
LatentAttention read_branches(const LayerReader& in);

// What both begin with: sizes, scale, query and output; branches and rotary key are left out.
LatentAttention read_query_and_output(const LayerReader& in);

// Brings rotary rows from interleaved pairs (2j, 2j+1) to halves (j, j + p/2), in the query and the rotary
// key, where the config says that they are interleaved.
void to_halves(const LayerReader& in, LatentAttention& attention);

}  // namespace relatent
