#include "convert/tune.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "convert/model/forward.h"
#include "formats/error.h"

namespace relatent {
namespace {

// Sequences that rank rotary sizes: fitted on, and held out.
constexpr Index ranking_fit = 8;
constexpr Index ranking_held_out = 4;

Sequences last_sequences(const Sequences& all, Index count) {
  Sequences out;
  out.count = count;
  out.length = all.length;
  out.tokens.assign(all.tokens.end() - count * all.length, all.tokens.end());
  return out;
}

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

SizeTrial SizeSearch::trial(Index rope_dim, Index rank, const Sequences& fit, const Sequences& held_out,
                            const RelatentOptions& options) {
  RelatentOptions sized = options;
  sized.rope_dim = rope_dim;
  sized.rank = rank;
  RelatentConversion conversion(source_, moments_, fit, sized);
  Stream source_stream(source_, held_out);
  Stream converted_stream = source_stream;
  for (Index i = 0; i < source_.config().num_hidden_layers; ++i) {
    Layer layer = source_.layer(i);
    run_layer(layer, source_stream);
    layer.attention = conversion.next();
    run_layer(layer, converted_stream);
  }
  const LogitComparison logits = compare_logits(source_, source_stream, source_, converted_stream, held_out);
  trials_.push_back({rope_dim, rank, logits.converted_nll - logits.source_nll});
  if (watch_) {
    watch_(trials_.back());
  }
  return trials_.back();
}

SizeTrial SizeSearch::rotary_for(Index total) {
  const std::vector<Index> candidates = rotary_candidates(total);
  if (candidates.size() == 1) {
    return {candidates.front(), total - candidates.front(), std::numeric_limits<double>::quiet_NaN()};
  }
  const Index held = std::clamp<Index>(sequences_.count / 3, 1, ranking_held_out);
  const Index fit = std::min<Index>(sequences_.count - held, ranking_fit);
  RelatentOptions quick = options_;
  quick.fit.rounds = 1;
  quick.fit.queries_per_unknown = 2;
  SizeTrial best;
  for (const Index rope_dim : candidates) {
    const SizeTrial here = trial(rope_dim, total - rope_dim, first_sequences(sequences_, fit),
                                 last_sequences(sequences_, held), quick);
    // Of equals the smaller rotary key, which comes first.
    if (best.rank == 0 || here.nats < best.nats) {
      best = here;
    }
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
    return trial(rope_dim, total - rope_dim, fit, held_out, options_);
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
