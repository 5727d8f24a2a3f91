#include "convert/model/devices.h"

#include <algorithm>

#include "formats/error.h"

namespace relatent {
namespace {

// Branches of the same heads next to each other, as devices take them.
std::vector<Index> order_of(const LatentSizes& latent) {
  std::vector<Index> order;
  for (std::size_t b = 0; b < latent.branches.size(); ++b) {
    order.push_back(static_cast<Index>(b));
  }
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
    return latent.branches[static_cast<std::size_t>(a)].first_head <
           latent.branches[static_cast<std::size_t>(b)].first_head;
  });
  return order;
}

}  // namespace

Index DeviceShare::cache_elements(const LatentSizes& latent) const {
  Index out = latent.qk_rope_head_dim;
  for (const Index s : shared) {
    out += latent.shared_ranks[static_cast<std::size_t>(s)];
  }
  for (const BranchShare& share : branches) {
    out += latent.branches[static_cast<std::size_t>(share.branch)].rank;
  }
  return out;
}

std::string why_not_shared(const LatentSizes& latent, Index tp) {
  const auto count = static_cast<Index>(latent.branches.size());
  const std::string branches = std::to_string(count) + (count == 1 ? " latent" : " latents");
  if (tp <= 0) {
    return "there must be at least one device";
  }
  if (tp <= count) {
    return count % tp == 0 ? "" : std::to_string(tp) + " devices do not divide " + branches;
  }
  if (tp % count != 0) {
    return std::to_string(tp) + " devices are not a multiple of " + branches;
  }
  const Index split = tp / count;
  for (const BranchGeometry& branch : latent.branches) {
    if (branch.head_count % split != 0) {
      return "each latent would go to " + std::to_string(split) + " devices, which do not divide its " +
             std::to_string(branch.head_count) + " heads";
    }
  }
  return "";
}

std::vector<DeviceShare> device_shares(const LatentSizes& latent, Index tp) {
  const std::string reason = why_not_shared(latent, tp);
  if (!reason.empty()) {
    fail_usage("--tp " + std::to_string(tp) + " does not fit this model: " + reason);
  }
  const std::vector<Index> order = order_of(latent);
  const auto count = static_cast<Index>(order.size());
  const Index each = std::max<Index>(1, count / tp);
  const Index split = std::max<Index>(1, tp / count);
  std::vector<DeviceShare> out;
  for (Index device = 0; device < tp; ++device) {
    DeviceShare share;
    Index end = 0;
    for (Index i = 0; i < each; ++i) {
      const Index b = order[static_cast<std::size_t>(device / split * each + i)];
      const BranchGeometry& branch = latent.branches[static_cast<std::size_t>(b)];
      const Index heads = branch.head_count / split;
      const Index first = branch.first_head + device % split * heads;
      share.first_head = i == 0 ? first : std::min(share.first_head, first);
      end = std::max(end, first + heads);
      share.branches.push_back({b, first, heads});
      if (branch.shared &&
          std::find(share.shared.begin(), share.shared.end(), *branch.shared) == share.shared.end()) {
        share.shared.push_back(*branch.shared);
      }
    }
    share.head_count = end - share.first_head;
    out.push_back(std::move(share));
  }
  return out;
}

namespace {

// A norm on each head's numbers needs no other head's; one on all of them needs all.
NormedHeads part_of(const NormedHeads& all, const DeviceShare& share) {
  NormedHeads out = all;
  if (all.q_norm.gain.size() == all.head_dim) {
    out.q = all.q.rows(share.first_head * all.head_dim, share.head_count * all.head_dim);
  } else {
    out.first_head += share.first_head;
  }
  return out;
}

}  // namespace

LatentAttention part_of(const LatentAttention& a, const DeviceShare& share, bool keeps_bias) {
  const Index query = a.nope_dim + a.rope_dim;
  const Index up = a.nope_dim + a.v_dim;
  LatentAttention out;
  out.heads = share.head_count;
  out.nope_dim = a.nope_dim;
  out.rope_dim = a.rope_dim;
  out.v_dim = a.v_dim;
  out.scale = a.scale;
  out.softcap = a.softcap;
  out.rotary = a.rotary;
  out.q_down = a.q_down;
  out.q_norm = a.q_norm;
  out.q_mean_square = a.q_mean_square;
  out.q = a.q.rows(share.first_head * query, share.head_count * query);
  if (a.normed_heads) {
    out.normed_heads = part_of(*a.normed_heads, share);
  }
  out.rotary_key = a.rotary_key;
  out.norm_rows = a.norm_rows;
  out.norm_eps = a.norm_eps;
  for (const Index s : share.shared) {
    out.shared.push_back(a.shared[static_cast<std::size_t>(s)]);
  }
  for (const BranchShare& part : share.branches) {
    const LatentBranch& whole = a.branches[static_cast<std::size_t>(part.branch)];
    LatentBranch branch;
    branch.down = whole.down;
    branch.norm = whole.norm;
    branch.mean_square = whole.mean_square;
    branch.up = whole.up.middleRows((part.first_head - whole.first_head) * up, part.head_count * up);
    branch.first_head = part.first_head - share.first_head;
    branch.head_count = part.head_count;
    if (whole.shared) {
      branch.shared =
          std::find(share.shared.begin(), share.shared.end(), *whole.shared) - share.shared.begin();
    }
    out.branches.push_back(std::move(branch));
  }
  out.o.weight = a.o.weight.middleCols(share.first_head * a.v_dim, share.head_count * a.v_dim);
  if (keeps_bias) {
    out.o.bias = a.o.bias;
  }
  return out;
}

}  // namespace relatent
