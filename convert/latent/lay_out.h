// The partitioned forms: how a latent layer is cut into pieces that devices can hold apart.
//
// Heads fall into groups with latents of their own (GLA: Zadouri et al. 2025, arXiv 2505.21487), and the
// latents of a group into parts that all its heads read (TPLA: Tang et al. 2025, arXiv 2508.15881; MLRA: Liu
// et al. 2026). Σ over parts of softmax(s) U^V_b c_b is softmax(s) Σ_b U^V_b c_b whenever every part can form
// the whole score, so the parts of a group share their key coordinates and split their value coordinates.
#pragma once

#include <vector>

#include "convert/latent/partition.h"
#include "convert/model/attention.h"
#include "convert/model/latent_sizes.h"

namespace relatent {

// Sizes of one group's latents.
struct GroupSizes {
  Index key_rank = 0;  // coordinates that its parts share; of a single part all that scores may read
  Index rank = 0;      // distinct coordinates together, key_rank included
};

// Fills in rank, shared_ranks and branches of a shape. A group of several parts has key_rank shared
// coordinates (none for 0), and rank - key_rank that its parts divide as evenly as can be.
void lay_out(const Partition& partition, const std::vector<GroupSizes>& groups, LatentShape& shape);

// A layer with one branch per group, whose scores read only the first key_rank coordinates, as the layer of
// `shape`: same output. Values that read a shared coordinate do so in the first part. Throws std::logic_error
// when the branches are not one per group, or one that has several parts is normalised: its norm reads them
// all.
LatentAttention split_values(const LatentAttention& grouped, const Partition& partition,
                             const LatentShape& shape);

}  // namespace relatent
