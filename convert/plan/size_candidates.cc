#include "convert/plan/size_candidates.h"

#include <algorithm>
#include <string>

#include "convert/plan/sizes.h"
#include "formats/error.h"

namespace relatent {

void check_trial_sequences(const Sequences& sequences) {
  if (sequences.count < 2) {
    fail_usage(
        "sizes are chosen on calibration sequences that the fits do not see, and there is only one: "
        "calibrate on more, or give --rope-dim and --rank");
  }
}

std::vector<CacheSizes> rotary_candidates(const GqaGeometry& gqa, bool plain_list, Index total) {
  const Index most = std::min(total - size_step, plain_list ? gqa.rotary_dim : gqa.rotating_keys());
  const Index middle = plain_list ? gqa.rotary_dim * 3 / 4 : total / 4;
  const Index nearest = std::max(size_step, (middle + size_step / 2) / size_step * size_step);
  std::vector<CacheSizes> out;
  for (const Index size : {nearest - size_step, nearest, nearest + size_step}) {
    if (size >= size_step && size <= most) {
      out.push_back({size, total - size});
    }
  }
  if (out.empty()) {
    const Index size = std::max<Index>(2, std::min(most, size_step) / 2 * 2);
    out.push_back({size, total - size});
  }
  return out;
}

CacheSizes middle_candidate(const GqaGeometry& gqa, bool plain_list, Index total) {
  const std::vector<CacheSizes> candidates = rotary_candidates(gqa, plain_list, total);
  return candidates[candidates.size() / 2];
}

DeviceSplit::DeviceSplit(const ConvertOptions& options, const ConvertInputs& inputs)
    : partition_(inputs.partition),
      per_device_(*options.per_device - layout_elements(options, inputs)),
      step_(per_device_ < 6 * size_step ? size_step / 2 : size_step),
      moves_rotary_(inputs.source.config().gqa && !options.rope_dim),
      moves_keys_(partition_.parts > 1 && !options.key_rank) {
  const ModelConfig& config = inputs.source.config();
  std::optional<Index> rope_dim = options.rope_dim;
  if (config.gqa) {
    const GqaGeometry& gqa = *config.gqa;
    most_rotary_ = has_plain_list(options, *inputs.engine) ? gqa.rotary_dim : gqa.rotating_keys();
    most_read_ = readable_rank(partition_, config.num_attention_heads, gqa);
    most_rank_ = inputs.engine->default_rank(config);
  } else {
    most_rotary_ = config.latent->qk_rope_head_dim;
    rope_dim = most_rotary_;
  }
  const Index third = std::max(step_, (per_device_ / 3 + step_ / 2) / step_ * step_);
  const Index rotary = rope_dim.value_or(std::min(third, most_rotary_));
  Index keys = partition_.parts > 1 ? options.key_rank.value_or(third) : 0;
  if (moves_keys_) {
    keys = std::clamp<Index>(keys, 0, std::max<Index>(0, per_device_ - rotary - 1));
  }
  const std::optional<CacheSizes> first = with(rotary, keys);
  if (!first) {
    const bool room = per_device_ > rotary + keys;
    fail_usage("--per-device " + std::to_string(*options.per_device) + " leaves " +
               (room ? "more than a latent can hold" : "no room") + " beside a rotary key of " +
               std::to_string(rotary) +
               (partition_.parts > 1 ? " and shared coordinates of " + std::to_string(keys) : "") +
               (room ? ": give less" : ""));
  }
  first_ = *first;
}

std::optional<CacheSizes> DeviceSplit::with(Index rope_dim, Index key_rank) const {
  const Index own = per_device_ - rope_dim - key_rank;
  const CacheSizes out{rope_dim, partition_.groups * (key_rank + partition_.parts * own), key_rank};
  const Index read = partition_.parts > 1 ? key_rank : own;
  const bool room = rope_dim >= 2 && rope_dim <= most_rotary_ && key_rank >= 0 && own > 0 &&
                    read <= most_read_.value_or(read) && out.rank <= most_rank_.value_or(out.rank);
  return room ? std::optional(out) : std::nullopt;
}

std::vector<CacheSizes> DeviceSplit::reachable() const {
  // From sizes that have room, both ways as long as there is room.
  const auto moved = [this](const CacheSizes& from, Index rotary_step, Index key_step) {
    std::vector<CacheSizes> out;
    for (const Index way : {Index{-1}, Index{1}}) {
      for (Index i = 1;
           const auto sizes = with(from.rope_dim + way * i * rotary_step, from.key_rank + way * i * key_step);
           ++i) {
        out.push_back(*sizes);
      }
    }
    return out;
  };
  std::vector<CacheSizes> out = {first_};
  if (moves_keys_) {
    const std::vector<CacheSizes> more = moved(first_, 0, step_);
    out.insert(out.end(), more.begin(), more.end());
  }
  if (moves_rotary_) {
    for (const CacheSizes& from : std::vector<CacheSizes>(out)) {
      const std::vector<CacheSizes> more = moved(from, step_, 0);
      out.insert(out.end(), more.begin(), more.end());
    }
  }
  return out;
}

CacheBisection::CacheBisection(const GqaGeometry& gqa)
    : whole_(2 * gqa.num_key_value_heads * gqa.head_dim), high_(whole_ / size_step) {}

std::vector<Index> CacheBisection::reachable() const {
  std::vector<Index> out;
  for (Index steps = low_ + 1; steps < high_; ++steps) {
    out.push_back(steps * size_step);
  }
  out.push_back(high_ == whole_ / size_step ? whole_ : high_ * size_step);
  return out;
}

}  // namespace relatent
