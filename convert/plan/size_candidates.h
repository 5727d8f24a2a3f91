// The sizes that trials may choose, from options and headers alone: what a search moves over, and what is
// said of it before any trial.
#pragma once

#include <optional>
#include <vector>

#include "convert/model/config.h"
#include "convert/plan/inputs.h"
#include "convert/plan/options.h"

namespace relatent {

// Sizes that are chosen are whole multiples of this, as kernels like them.
inline constexpr Index size_step = 16;

// Elements per token and layer.
struct CacheSizes {
  Index rope_dim = 0;
  Index rank = 0;      // of all latents together
  Index key_rank = 0;  // of them, those that the parts of a group share
};

// Throws Error (usage) when no sequence can be kept from the fits of a trial.
void check_trial_sequences(const Sequences& sequences);

// Rotary key and rank of `total` numbers together: the rotary key is a quarter of them or next to that (of a
// plain list half, three quarters or all of the head). The smallest rotary key first; one pair at least.
std::vector<CacheSizes> rotary_candidates(const GqaGeometry& gqa, bool plain_list, Index total);

// The one in the middle.
CacheSizes middle_candidate(const GqaGeometry& gqa, bool plain_list, Index total);

// Rotary key and shared coordinates of --per-device numbers, as far as the options leave them open.
class DeviceSplit {
 public:
  // options: completed (plan.h), with --per-device. Throws Error (usage) when what is tried first has no
  // room.
  DeviceSplit(const ConvertOptions& options, const ConvertInputs& inputs);

  // Tried first: a third of the numbers each, or what is given.
  const CacheSizes& first() const { return first_; }
  // The others are tried in steps of so many numbers; small caches are cut finer.
  Index step() const { return step_; }
  bool moves_rotary() const { return moves_rotary_; }
  bool moves_keys() const { return moves_keys_; }
  // With this rotary key and these shared coordinates; none where there is no room for them.
  std::optional<CacheSizes> with(Index rope_dim, Index key_rank) const;
  // All that a search can end with which moves first the shared coordinates and then the rotary key.
  std::vector<CacheSizes> reachable() const;

 private:
  Partition partition_;
  Index per_device_;
  Index step_;
  bool moves_rotary_;
  bool moves_keys_;
  Index most_rotary_ = 0;
  std::optional<Index> most_read_;  // what the heads of a group can fill of a latent that scores read
  std::optional<Index> most_rank_;  // what the layout holds
  CacheSizes first_;
};

// The smallest cache that is good enough, by halving the range again and again.
class CacheBisection {
 public:
  explicit CacheBisection(const GqaGeometry& gqa);

  // The source's cache, which is taken when nothing smaller is good enough.
  Index whole() const { return whole_; }
  bool over() const { return high_ - low_ <= 1; }
  // The cache to try now, in elements per token and layer.
  Index next() const { return (low_ + high_) / 2 * size_step; }
  // Whether it was good enough.
  void tell(bool enough) { (enough ? high_ : low_) = (low_ + high_) / 2; }
  // All that the rest of the search can end with.
  std::vector<Index> reachable() const;

 private:
  Index whole_;
  // In steps: `high` is known to do (or is the whole cache), `low` is known not to (or too small to exist).
  Index low_ = 1;
  Index high_;
};

}  // namespace relatent
