#include "convert/methods/size_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert/compute/backend.h"
#include "formats/error.h"

namespace relatent {
namespace {

// Sequences that rank rotary sizes: fitted on, and held out.
constexpr Index ranking_fit = 8;
constexpr Index ranking_held_out = 4;

}  // namespace

SizeSearch::SizeSearch(const Model& source, std::function<Moments(Index)> moments, const Sequences& sequences,
                       const RelatentOptions& options, Watch watch)
    : source_(source),
      moments_(std::move(moments)),
      sequences_(sequences),
      options_(options),
      watch_(std::move(watch)) {
  if (sequences.count < 2) {
    fail_usage(
        "sizes are chosen on calibration sequences that the fits do not see, and there is only one: "
        "calibrate on more, or give --rope-dim and --rank");
  }
}

std::vector<Index> SizeSearch::rotary_candidates(Index total) const {
  const GqaGeometry& gqa = *source_.config().gqa;
  const Index most = std::min(total - size_step,
                              options_.plain_list ? gqa.head_dim : gqa.num_key_value_heads * gqa.head_dim);
  const Index middle = options_.plain_list ? gqa.head_dim * 3 / 4 : total / 4;
  const Index nearest = std::max(size_step, (middle + size_step / 2) / size_step * size_step);
  std::vector<Index> out;
  for (const Index size : {nearest - size_step, nearest, nearest + size_step}) {
    if (size >= size_step && size <= most) {
      out.push_back(size);
    }
  }
  if (out.empty()) {
    out.push_back(std::max<Index>(2, std::min(most, size_step)));
  }
  return out;
}

SizeTrial SizeSearch::trial(const SizeTrial& sizes, const Sequences& fit, const Sequences& held_out,
                            const RelatentOptions& options) {
  for (const SizeTrial& made : earlier_trials_) {
    if (made.rope_dim == sizes.rope_dim && made.rank == sizes.rank && made.key_rank == sizes.key_rank) {
      trials_.push_back(made);
      return made;
    }
  }
  RelatentOptions sized = options;
  sized.rope_dim = sizes.rope_dim;
  sized.rank = sizes.rank;
  sized.key_rank = sizes.key_rank;
  RelatentConversion conversion(source_, moments_, fit, sized);
  Stream source_stream(source_, held_out);
  Stream converted_stream = source_stream;
  for (Index i = 0; i < source_.config().num_hidden_layers; ++i) {
    Layer layer = backend().load_layer(source_, i, DType::f32);
    run_layer(layer, source_stream);
    layer.attention = conversion.next();
    run_layer(layer, converted_stream);
  }
  const LogitComparison logits =
      backend().compare_logits(source_, source_stream, source_, converted_stream, held_out);
  trials_.push_back({sizes.rope_dim, sizes.rank, logits.converted_nll - logits.source_nll, sizes.key_rank});
  if (watch_) {
    watch_(trials_.back());
  }
  return trials_.back();
}

SizeTrial SizeSearch::quick_trial(const SizeTrial& sizes) {
  const Index held = std::clamp<Index>(sequences_.count / 3, 1, ranking_held_out);
  const Index fit = std::min<Index>(sequences_.count - held, ranking_fit);
  RelatentOptions quick = options_;
  quick.fit.rounds = 1;
  quick.fit.queries_per_unknown = 2;
  return trial(sizes, first_sequences(sequences_, fit), last_sequences(sequences_, held), quick);
}

SizeTrial SizeSearch::rotary_for(Index total) {
  const std::vector<Index> candidates = rotary_candidates(total);
  if (candidates.size() == 1) {
    return {candidates.front(), total - candidates.front(), std::numeric_limits<double>::quiet_NaN()};
  }
  SizeTrial best;
  for (const Index rope_dim : candidates) {
    const SizeTrial here = quick_trial({rope_dim, total - rope_dim});
    // Of equals the smaller rotary key, which comes first.
    if (best.rank == 0 || here.nats < best.nats) {
      best = here;
    }
  }
  return best;
}

SizeTrial SizeSearch::split_for(Index per_device, std::optional<Index> rope_dim,
                                std::optional<Index> key_rank) {
  const Partition& partition = options_.partition;
  const bool shares = partition.parts > 1;
  // Small caches are cut finer.
  const Index step = per_device < 6 * size_step ? size_step / 2 : size_step;
  const Index third = std::max(step, (per_device / 3 + step / 2) / step * step);
  const Index most_rotary = source_.config().gqa
                                ? source_.config().gqa->num_key_value_heads * source_.config().gqa->head_dim
                                : source_.config().latent->qk_rope_head_dim;
  const auto sized = [&](Index rotary, Index keys) {
    const Index own = per_device - rotary - keys;
    return SizeTrial{rotary, partition.groups * (keys + partition.parts * own), 0, keys};
  };
  const auto fits = [&](Index rotary, Index keys) {
    return rotary >= 2 && rotary <= most_rotary && keys >= 0 && per_device - rotary - keys > 0;
  };
  Index rotary = rope_dim.value_or(std::min(third, most_rotary));
  Index keys = shares ? key_rank.value_or(third) : 0;
  if (shares && !key_rank) {
    keys = std::clamp<Index>(keys, 0, std::max<Index>(0, per_device - rotary - 1));
  }
  if (!fits(rotary, keys)) {
    fail_usage("--per-device " + std::to_string(per_device) + " leaves no room beside a rotary key of " +
               std::to_string(rotary) + (shares ? " and shared coordinates of " + std::to_string(keys) : ""));
  }
  SizeTrial best = quick_trial(sized(rotary, keys));
  const auto walk = [&](Index rotary_step, Index key_step) {
    while (fits(best.rope_dim + rotary_step, best.key_rank + key_step)) {
      const SizeTrial here = quick_trial(sized(best.rope_dim + rotary_step, best.key_rank + key_step));
      if (!(here.nats < best.nats)) {
        return;
      }
      best = here;
    }
  };
  const auto both_ways = [&](Index rotary_step, Index key_step) {
    const double before = best.nats;
    walk(rotary_step, key_step);
    if (best.nats == before) {
      walk(-rotary_step, -key_step);
    }
  };
  if (shares && !key_rank) {
    both_ways(0, step);
  }
  if (!rope_dim) {
    both_ways(step, 0);
  }
  return best;
}

SizeTrial SizeSearch::smallest_within(double max_nats) {
  const GqaGeometry& gqa = *source_.config().gqa;
  const Index whole = 2 * gqa.num_key_value_heads * gqa.head_dim;
  const Index held = std::max<Index>(1, sequences_.count / 4);
  const Sequences fit = first_sequences(sequences_, sequences_.count - held);
  const Sequences held_out = last_sequences(sequences_, held);
  const auto measured = [&](Index total) {
    const std::vector<Index> candidates = rotary_candidates(total);
    const Index rope_dim = candidates[candidates.size() / 2];
    return trial({rope_dim, total - rope_dim}, fit, held_out, options_);
  };
  // In steps: `high` is known to do (or is the whole cache), `low` is known not to (or too small to exist).
  Index low = 1;
  Index high = whole / size_step;
  SizeTrial best;
  while (high - low > 1) {
    const Index middle = (low + high) / 2;
    const SizeTrial here = measured(middle * size_step);
    if (here.nats <= max_nats) {
      high = middle;
      best = here;
    } else {
      low = middle;
    }
  }
  return best.rank > 0 ? best : measured(whole);
}

}  // namespace relatent
