#include "convert/methods/size_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "convert/compute/backend.h"

namespace relatent {
namespace {

// Sequences that rank rotary sizes: fitted on, and held out.
constexpr Index ranking_fit = 8;
constexpr Index ranking_held_out = 4;

}  // namespace

SizeSearch::SizeSearch(const Model& source, std::function<Moments(Index)> moments, const Sequences& sequences,
                       RelatentOptions options, Watch watch)
    : source_(source),
      moments_(std::move(moments)),
      sequences_(sequences),
      options_(std::move(options)),
      watch_(std::move(watch)) {
  check_trial_sequences(sequences);
}

SizeTrial SizeSearch::trial(const CacheSizes& sizes, const Sequences& fit, const Sequences& held_out,
                            const RelatentOptions& options) {
  for (const SizeTrial& made : earlier_trials_) {
    if (made == sizes) {
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
    if (std::optional<LatentAttention> converted = conversion.next()) {
      layer.attention = std::move(*converted);
    }
    run_layer(layer, converted_stream);
  }
  const LogitComparison logits =
      backend().compare_logits(source_, source_stream, source_, converted_stream, held_out);
  trials_.push_back({sizes, logits.converted_nll - logits.source_nll});
  if (watch_) {
    watch_(trials_.back());
  }
  return trials_.back();
}

SizeTrial SizeSearch::quick_trial(const CacheSizes& sizes) {
  const Index held = std::clamp<Index>(sequences_.count / 3, 1, ranking_held_out);
  const Index fit = std::min<Index>(sequences_.count - held, ranking_fit);
  RelatentOptions quick = options_;
  quick.fit.rounds = 1;
  quick.fit.output_rounds = 0;
  quick.fit.queries_per_unknown = 2;
  return trial(sizes, first_sequences(sequences_, fit), last_sequences(sequences_, held), quick);
}

std::vector<CacheSizes> SizeSearch::with_worthwhile(std::vector<CacheSizes> candidates) const {
  RelatentOptions options = options_;
  options.rope_dim = candidates.front().rope_dim;
  const Index total = options.rope_dim + candidates.front().rank;
  const Index size = RelatentConversion(source_, moments_, {}, options).worthwhile_rope_dim();
  const auto at = std::find_if(candidates.begin(), candidates.end(),
                               [&](const CacheSizes& one) { return one.rope_dim >= size; });
  if (size < total && (at == candidates.end() || at->rope_dim != size)) {
    candidates.insert(at, {size, total - size});
  }
  return candidates;
}

SizeTrial SizeSearch::rotary_for(Index total) {
  std::vector<CacheSizes> candidates = rotary_candidates(*source_.config().gqa, options_.plain_list, total);
  if (options_.plain_list && !options_.list_stride) {
    candidates = with_worthwhile(std::move(candidates));
  }
  if (candidates.size() == 1) {
    return {candidates.front(), std::numeric_limits<double>::quiet_NaN()};
  }
  SizeTrial best;
  for (const CacheSizes& sizes : candidates) {
    const SizeTrial here = quick_trial(sizes);
    // Of equals the smaller rotary key, which comes first.
    if (best.rank == 0 || here.nats < best.nats) {
      best = here;
    }
  }
  return best;
}

SizeTrial SizeSearch::split_for(const DeviceSplit& split) {
  SizeTrial best = first_of(split);
  const auto walk = [&](Index rotary_step, Index key_step) {
    while (const auto next = split.with(best.rope_dim + rotary_step, best.key_rank + key_step)) {
      const SizeTrial here = quick_trial(*next);
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
  if (split.moves_keys()) {
    both_ways(0, split.step());
  }
  if (split.moves_rotary()) {
    both_ways(split.step(), 0);
  }
  return best;
}

SizeTrial SizeSearch::smallest_within(double max_nats) {
  const GqaGeometry& gqa = *source_.config().gqa;
  const Index held = std::max<Index>(1, sequences_.count / 4);
  const Sequences fit = first_sequences(sequences_, sequences_.count - held);
  const Sequences held_out = last_sequences(sequences_, held);
  const auto measured = [&](Index total) {
    return trial(middle_candidate(gqa, options_.plain_list, total), fit, held_out, options_);
  };
  CacheBisection range(gqa);
  SizeTrial best;
  while (!range.over()) {
    const SizeTrial here = measured(range.next());
    const bool enough = here.nats <= max_nats;
    range.tell(enough);
    if (enough) {
      best = here;
    }
  }
  return best.rank > 0 ? best : measured(range.whole());
}

}  // namespace relatent
