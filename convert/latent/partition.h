// How the heads of a layer and the latents that they read are divided.
#pragma once

#include "linalg/matrix.h"

namespace relatent {

// Where piece `index` begins when `size` is cut into `count` pieces as even as can be; all of it for
// index = count.
inline Index cut_at(Index index, Index count, Index size) {
  return index * size / count;
}

// Heads in groups with latents of their own, and the latents of a group, which all its heads read.
struct Partition {
  Index groups = 1;  // of heads
  Index parts = 1;   // latents of each group's heads

  Index latents() const { return groups * parts; }
  // A single latent that every head reads: MLA.
  bool whole() const { return latents() == 1; }
  // Heads first_head(g) ... first_head(g + 1) - 1 belong to group g; as even as can be.
  Index first_head(Index group, Index heads) const { return cut_at(group, groups, heads); }
  // Latent of a part of a group, as MLRA's authors number them.
  Index latent(Index group, Index part) const { return part * groups + group; }
  bool operator==(const Partition&) const = default;
};

}  // namespace relatent
