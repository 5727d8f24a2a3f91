// How tensor-parallel devices share one latent attention layer: which branches and heads each of them has.
#pragma once

#include <string>
#include <vector>

#include "convert/model/attention.h"
#include "convert/model/config.h"

namespace relatent {

struct BranchShare {
  Index branch = 0;
  Index first_head = 0;  // of the model's heads
  Index head_count = 0;
};

// What one device holds: the rotary key, these parts of branches with the shared coordinates that they read,
// and queries and o_proj columns of these heads. The devices' outputs add up to the layer's.
struct DeviceShare {
  Index first_head = 0;
  Index head_count = 0;
  std::vector<BranchShare> branches;
  std::vector<Index> shared;

  // Elements per token and layer in its cache.
  Index cache_elements(const LatentSizes& latent) const;
};

// Why tp devices cannot share the layer, as a clause; empty when they can. Up to as many devices as there are
// branches take whole branches (of the same heads first); more devices split the heads of a branch, so either
// the branches must divide by the devices, or the devices by the branches and the heads of a branch by what
// is left.
std::string why_not_shared(const LatentSizes& latent, Index tp);

// One share for each device. Throws Error (usage) with why_not_shared's clause.
std::vector<DeviceShare> device_shares(const LatentSizes& latent, Index tp);

// The layer as one device has it: a layer of its own with fewer branches, heads and o_proj columns. Only the
// device with keeps_bias adds o_proj's bias, so that the outputs of all devices sum to the layer's.
LatentAttention part_of(const LatentAttention& attention, const DeviceShare& share, bool keeps_bias);

}  // namespace relatent
