#include "convert/run/size_choice.h"

#include <sstream>

#include "convert/plan/sizes.h"
#include "formats/error.h"

namespace relatent {
namespace {

constexpr const char* trial_entry = "trial";

// Trials that an interrupted search recorded.
std::vector<SizeTrial> recorded_trials(const WorkFolder* work) {
  std::vector<SizeTrial> out;
  for (const auto& [name, value] : work != nullptr ? work->journal().entries() : JournalEntries()) {
    SizeTrial trial;
    std::istringstream fields(value);
    if (name == trial_entry && fields >> trial.rope_dim >> trial.rank >> trial.key_rank >> trial.nats) {
      out.push_back(trial);
    }
  }
  return out;
}

}  // namespace

SizeChoice choose_sizes_by_trials(const ConvertOptions& options, const ConvertInputs& inputs,
                                  WorkFolder* work, const SizeSearch::Watch& watch) {
  const ModelConfig& config = inputs.source.config();
  SizeChoice out;
  out.options = options;
  const bool shared = options.relatent.order == LatentOrder::shared;
  const bool wants_rotary =
      inputs.partition.whole() && options.kv_budget && !options.rope_dim && !options.rank;
  const bool wants_split =
      shared && !inputs.partition.whole() && options.per_device &&
      ((config.gqa && !options.rope_dim) || (inputs.partition.parts > 1 && !options.key_rank));
  if (options.max_nats && !inputs.partition.whole()) {
    fail_usage("--kv-budget auto belongs to --to mla; for " + options.form + " give --per-device");
  }
  if (options.method != Method::relatent || !(wants_rotary || wants_split || options.max_nats)) {
    return out;
  }
  if (options.max_nats && (options.kv_budget || options.rank || options.rope_dim)) {
    fail_usage("--max-nats chooses the sizes: leave out --rank and --rope-dim, and give --kv-budget auto");
  }
  check_calibration(inputs);
  SizeSearch search(
      inputs.source, [&](Index layer_idx) { return input_moments(inputs, layer_idx); },
      fit_sequences(options, inputs), relatent_options(options, inputs, {}),
      [&](const SizeTrial& trial) {
        if (work != nullptr) {
          work->record(trial_entry, std::to_string(trial.rope_dim) + " " + std::to_string(trial.rank) + " " +
                                        std::to_string(trial.key_rank) + " " + exact_text(trial.nats));
        }
        if (watch) {
          watch(trial);
        }
      });
  search.take_over(recorded_trials(work));
  SizeTrial chosen;
  if (wants_split) {
    const std::optional<Index> rotary = config.latent ? config.latent->qk_rope_head_dim : options.rope_dim;
    chosen = search.split_for(*options.per_device, rotary, options.key_rank);
    out.options.rope_dim = chosen.rope_dim;
    if (inputs.partition.parts > 1) {
      out.options.key_rank = chosen.key_rank;
    }
    out.trials = search.trials();
    return out;
  }
  if (options.max_nats) {
    chosen = search.smallest_within(*options.max_nats);
    if (!(chosen.nats <= *options.max_nats)) {
      out.warnings.emplace_back("no cache below the source's stays within the nats asked for");
    }
  } else {
    const Index total = budget_numbers(*options.kv_budget, config) / size_step * size_step;
    if (total < 2 * size_step) {
      fail_usage("--kv-budget leaves less than " + std::to_string(2 * size_step) +
                 " numbers: give --rope-dim and --rank for a cache that small");
    }
    chosen = search.rotary_for(total);
    out.options.kv_budget.reset();
  }
  out.options.rope_dim = chosen.rope_dim;
  out.options.rank = chosen.rank;
  out.trials = search.trials();
  return out;
}

}  // namespace relatent
