// Sizes chosen by what they lose on calibration tokens that the fits have not seen.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "convert/methods/relatent.h"
#include "convert/plan/plan.h"
#include "convert/plan/size_candidates.h"

namespace relatent {

// What trials run on.
class SizeSearch {
 public:
  using Watch = std::function<void(const SizeTrial&)>;

  // options: everything but the sizes. Needs at least two sequences (usage otherwise, saying so).
  SizeSearch(const Model& source, std::function<Moments(Index)> moments, const Sequences& sequences,
             RelatentOptions options, Watch watch);

  // Trials that an earlier search for the same was told of: taken over when their turn comes, unwatched.
  void take_over(std::vector<SizeTrial> trials) { earlier_trials_ = std::move(trials); }

  // The best of the rotary_candidates for a cache of `total` numbers, tried with fewer tokens, which rank
  // them well enough. One candidate is taken untried. Of a plain list the size at which its frequencies cease
  // to be worthwhile (rotary_key.h) is tried too.
  SizeTrial rotary_for(Index total);

  // What a search for a split begins with.
  SizeTrial first_of(const DeviceSplit& split) { return quick_trial(split.first()); }

  // Shared coordinates and then the rotary key moved in steps as long as it helps, ranked like rotary sizes.
  SizeTrial split_for(const DeviceSplit& split);

  // The smallest cache that loses at most max_nats, by bisection, fitted in full on three quarters of the
  // sequences and measured on the rest; the whole of the source's cache when none does.
  SizeTrial smallest_within(double max_nats);

  // Every trial made, in order.
  const std::vector<SizeTrial>& trials() const { return trials_; }

 private:
  SizeTrial trial(const CacheSizes& sizes, const Sequences& fit, const Sequences& held_out,
                  const RelatentOptions& options);
  // With the sizes at which a plain list is best spent.
  std::vector<CacheSizes> with_worthwhile(std::vector<CacheSizes> candidates) const;
  // The same with the few tokens that rank sizes.
  SizeTrial quick_trial(const CacheSizes& sizes);

  const Model& source_;
  std::function<Moments(Index)> moments_;
  Sequences sequences_;
  RelatentOptions options_;
  Watch watch_;
  std::vector<SizeTrial> earlier_trials_;
  std::vector<SizeTrial> trials_;
};

}  // namespace relatent
