// MLA that loses nothing (TransMLA section 4.1 shows the embedding; the rotary list here keeps every pair),
// and holds nothing twice: what is a linear combination of something else, to rounding in float64, is not
// cached.
//
// Keys that rotate are combined within a frequency only, by complex numbers, which commute with the rotation.
// What does not rotate needs no rotary key: it shares the latent with the values.
#pragma once

#include <vector>

#include "convert/latent/lay_out.h"
#include "convert/latent/maps.h"
#include "convert/latent/partition.h"

namespace relatent {

// What a layer takes, or several layers together.
struct LosslessSizes {
  std::vector<Index> components;   // of each frequency that rotates, combinations of the K keys
  std::vector<GroupSizes> groups;  // key_rank: of keys that do not rotate; rank: of those and values together

  Index rope_dim() const;
};

// rotating: the leading pairs of a head that rotate in some layer of the model. Of maps the keys and values
// are looked at.
LosslessSizes lossless_sizes(const LayerMaps& maps, Index rotating, const Partition& partition);

// Room for both.
LosslessSizes larger_of(const LosslessSizes& a, const LosslessSizes& b);

// The list of every component, the source's frequencies again and again.
Rotary lossless_rotary(const Rotary& source, const std::vector<Index>& components);

// components: at least those of lossless_sizes. Where they are all K, every key coordinate keeps its
// rotation: pair g R + f belongs to group g, R pairs of a head, and the query of head h is zero outside its
// group. Content rows are the coordinates behind those R pairs.
RotaryKey lossless_rotary_key(const LayerMaps& maps, const std::vector<Index>& components);
RotaryKey lossless_rotary_key(const LayerMaps& maps);  // every pair of every group

// The latent of some heads: the keys that do not rotate and the values that they read, where nothing of them
// is redundant those themselves. sizes: at least those of lossless_sizes; zeros fill what is more.
JointLatent lossless_latent(const LayerMaps& maps, Index rotating, Index first_head, Index head_count,
                            const GroupSizes& sizes);
// Of heads that rotate whole.
JointLatent lossless_latent(const LayerMaps& maps, Index first_head, Index head_count);
JointLatent lossless_latent(const LayerMaps& maps);  // of all heads

}  // namespace relatent
