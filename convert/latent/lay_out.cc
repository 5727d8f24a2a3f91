#include "convert/latent/lay_out.h"

#include <stdexcept>

namespace relatent {

void lay_out(const Partition& partition, const std::vector<GroupSizes>& groups, LatentShape& shape) {
  shape.kv_lora_rank = 0;
  shape.shared_ranks.clear();
  shape.branches.assign(static_cast<std::size_t>(partition.latents()), {});
  for (Index g = 0; g < partition.groups; ++g) {
    const GroupSizes& sizes = groups[static_cast<std::size_t>(g)];
    shape.kv_lora_rank += sizes.rank;
    const bool shares = partition.parts > 1 && sizes.key_rank > 0;
    const Index own = sizes.rank - (shares ? sizes.key_rank : 0);
    const Index first_head = partition.first_head(g, shape.heads);
    const Index heads = partition.first_head(g + 1, shape.heads) - first_head;
    for (Index part = 0; part < partition.parts; ++part) {
      const Index rank = cut_at(part + 1, partition.parts, own) - cut_at(part, partition.parts, own);
      shape.branches[static_cast<std::size_t>(partition.latent(g, part))] = {
          first_head, heads, rank,
          shares ? std::optional(static_cast<Index>(shape.shared_ranks.size())) : std::nullopt};
    }
    if (shares) {
      shape.shared_ranks.push_back(sizes.key_rank);
    }
  }
}

LatentAttention split_values(const LatentAttention& grouped, const Partition& partition,
                             const LatentShape& shape) {
  if (static_cast<Index>(grouped.branches.size()) != partition.groups) {
    throw std::logic_error("split_values: one branch for each group of heads is expected");
  }
  if (partition.parts == 1) {
    return grouped;
  }
  const Index n = grouped.nope_dim;
  const Index w = grouped.v_dim;
  LatentAttention out = grouped;
  out.branches.assign(static_cast<std::size_t>(partition.latents()), {});
  for (Index g = 0; g < partition.groups; ++g) {
    const LatentBranch& group = grouped.branches[static_cast<std::size_t>(g)];
    if (group.norm.present()) {
      throw std::logic_error("split_values: a normalised latent cannot be split");
    }
    const BranchGeometry& first = shape.branches[static_cast<std::size_t>(partition.latent(g, 0))];
    const Index keys = first.whole_rank(shape.shared_ranks) - first.rank;
    if (keys > 0) {
      out.shared.push_back(group.down.rows(0, keys));
    }
    Index own = keys;
    for (Index part = 0; part < partition.parts; ++part) {
      const Index at = partition.latent(g, part);
      const BranchGeometry& sizes = shape.branches[static_cast<std::size_t>(at)];
      LatentBranch branch;
      branch.down = group.down.rows(own, sizes.rank);
      branch.shared = sizes.shared;
      branch.first_head = group.first_head;
      branch.head_count = group.head_count;
      branch.mean_square = group.mean_square;
      branch.up = MatrixF::Zero(group.up.rows(), keys + sizes.rank);
      for (Index h = 0; h < group.head_count; ++h) {
        const Index row = h * (n + w);
        branch.up.block(row, 0, n, keys) = group.up.block(row, 0, n, keys);
        if (part == 0) {
          branch.up.block(row + n, 0, w, keys) = group.up.block(row + n, 0, w, keys);
        }
        branch.up.block(row + n, keys, w, sizes.rank) = group.up.block(row + n, own, w, sizes.rank);
      }
      own += sizes.rank;
      out.branches[static_cast<std::size_t>(at)] = std::move(branch);
    }
  }
  return out;
}

}  // namespace relatent
