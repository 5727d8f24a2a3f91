// MLA that loses nothing (TransMLA section 4.1 shows the embedding; the rotary list here keeps every pair).
#pragma once

#include "convert/latent/maps.h"

namespace relatent {

// The list of every key coordinate: the source's, once for each key head.
Rotary lossless_rotary(const Rotary& source, Index kv_heads);

// Every key coordinate keeps its rotation: p = K d with the list of frequencies repeated per group, pair g
// d/2 + f belonging to group g; query of head h is zero outside its group. No leftover (n = 0).
RotaryKey lossless_rotary_key(const LayerMaps& maps);

// The latent of some heads is the values that they read, rank K' d.
JointLatent lossless_latent(const LayerMaps& maps, Index first_head, Index head_count);
JointLatent lossless_latent(const LayerMaps& maps);  // of all heads

}  // namespace relatent
