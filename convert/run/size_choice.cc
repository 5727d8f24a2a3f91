#include "convert/run/size_choice.h"

#include <optional>
#include <sstream>
#include <utility>

#include "convert/plan/form_candidates.h"
#include "convert/plan/size_candidates.h"
#include "convert/plan/sizes.h"
#include "formats/error.h"

namespace relatent {
namespace {

constexpr const char* trial_entry = "trial";

// Trials that an interrupted search recorded.
std::vector<SizeTrial> recorded_trials(const WorkFolder* work, const std::string& label) {
  std::vector<SizeTrial> out;
  for (const auto& [name, value] : work != nullptr ? work->journal().entries() : JournalEntries()) {
    SizeTrial trial;
    std::string of;
    std::istringstream fields(value);
    if (name == trial_entry && fields >> trial.rope_dim >> trial.rank >> trial.key_rank >> trial.nats >> of &&
        of == label) {
      out.push_back(trial);
    }
  }
  return out;
}

// Knows the trials of the work folder, and records there those that it makes.
SizeSearch search_of(const ConvertOptions& options, const ConvertInputs& inputs, WorkFolder* work,
                     const SizeSearch::Watch& watch) {
  // Trials belong to one form: several are tried for --to auto.
  const std::string label = form_text(options.form, options.branches.value_or(1));
  SizeSearch out(
      inputs.source, [&inputs](Index layer_idx) { return input_moments(inputs, layer_idx); },
      fit_sequences(options, inputs), relatent_options(options, inputs, {}),
      [work, watch, label](const SizeTrial& trial) {
        if (work != nullptr) {
          work->record(trial_entry, std::to_string(trial.rope_dim) + " " + std::to_string(trial.rank) + " " +
                                        std::to_string(trial.key_rank) + " " + exact_text(trial.nats) + " " +
                                        label);
        }
        if (watch) {
          watch(trial);
        }
      });
  out.take_over(recorded_trials(work, label));
  return out;
}

// What the options leave to trials.
enum class Sought {
  rotary,    // of a cache of so many numbers
  split,     // of the numbers on each device
  smallest,  // cache that loses no more than so many nats
};

std::optional<Sought> sought(const ConvertOptions& options, const ConvertInputs& inputs) {
  const ModelConfig& config = inputs.source.config();
  const bool whole = inputs.partition.whole();
  if (options.max_nats && !whole) {
    fail_usage("--kv-budget auto belongs to --to mla; for " + options.form + " give --per-device");
  }
  if (options.method != Method::relatent || options.relatent.order != LatentOrder::shared) {
    return std::nullopt;
  }
  if (!whole) {
    const bool open = options.per_device && ((config.gqa && !options.rope_dim) ||
                                             (inputs.partition.parts > 1 && !options.key_rank));
    return open ? std::optional(Sought::split) : std::nullopt;
  }
  if (!config.gqa) {
    return std::nullopt;  // refused where sizes are chosen
  }
  if (options.max_nats) {
    if (options.kv_budget || options.rank || options.rope_dim) {
      fail_usage("--max-nats chooses the sizes: leave out --rank and --rope-dim, and give --kv-budget auto");
    }
    return Sought::smallest;
  }
  return options.kv_budget && !options.rope_dim && !options.rank ? std::optional(Sought::rotary)
                                                                 : std::nullopt;
}

// The numbers that a budget leaves for what heads read of the latent, and for the rotary key.
Index budgeted(const ConvertOptions& options, const ConvertInputs& inputs) {
  const Index total = budget_elements(*options.kv_budget, inputs.source.config()) / size_step * size_step;
  const Index read = total - layout_elements(options, inputs);
  if (total < 2 * size_step || read <= size_step) {
    fail_usage("--kv-budget leaves less than " + std::to_string(2 * size_step) +
               " numbers: give --rope-dim and --rank for a cache that small");
  }
  return read;
}

ConvertOptions with_sizes(const ConvertOptions& options, const ConvertInputs& inputs,
                          const CacheSizes& sizes) {
  ConvertOptions out = options;
  out.rope_dim = sizes.rope_dim;
  if (inputs.partition.whole()) {
    out.rank = sizes.rank;
    out.kv_budget.reset();
  } else if (inputs.partition.parts > 1) {
    out.key_rank = sizes.key_rank;
  }
  return out;
}

}  // namespace

SizeChoice search_sizes(const ConvertOptions& options, const ConvertInputs& inputs, WorkFolder* work,
                        const SizeSearch::Watch& watch) {
  SizeChoice out;
  out.options = options;
  const std::optional<Sought> what = sought(options, inputs);
  if (!what) {
    return out;
  }
  SizeSearch search = search_of(options, inputs, work, watch);
  SizeTrial chosen;
  switch (*what) {
    case Sought::rotary:
      chosen = search.rotary_for(budgeted(options, inputs));
      break;
    case Sought::split:
      chosen = search.split_for(DeviceSplit(options, inputs));
      break;
    case Sought::smallest:
      chosen = search.smallest_within(*options.max_nats);
      if (!(chosen.nats <= *options.max_nats)) {
        out.warnings.emplace_back("no cache below the source's stays within the nats asked for");
      }
      break;
  }
  out.options = with_sizes(options, inputs, chosen);
  out.trials = search.trials();
  return out;
}

SizeChoice choose_sizes_by_trials(const ConvertOptions& options, const ConvertInputs& inputs,
                                  WorkFolder* work, const SizeSearch::Watch& watch) {
  if (sought(options, inputs)) {
    check_calibration(inputs);
  }
  return search_sizes(options, inputs, work, watch);
}

SizeTrial try_first_sizes(const ConvertOptions& options, const ConvertInputs& inputs, WorkFolder* work,
                          const SizeSearch::Watch& watch) {
  return search_of(options, inputs, work, watch).first_of(DeviceSplit(options, inputs));
}

SizeChoice assume_sizes(const ConvertOptions& options, const ConvertInputs& inputs) {
  SizeChoice out;
  out.options = options;
  const std::optional<Sought> what = sought(options, inputs);
  if (!what) {
    return out;
  }
  check_trial_sequences(fit_sequences(options, inputs));
  const ModelConfig& config = inputs.source.config();
  const bool plain = has_plain_list(options, *inputs.engine);
  OpenSizes open;
  CacheSizes assumed;
  if (what == Sought::rotary) {
    const Index total = budgeted(options, inputs);
    open.all_tried = true;
    open.weights_add_one = plain && !options.relatent.list_stride;
    open.candidates = rotary_candidates(*config.gqa, plain, total);
    assumed = middle_candidate(*config.gqa, plain, total);
  } else if (what == Sought::split) {
    const DeviceSplit split(options, inputs);
    open.step = split.step();
    open.candidates = split.reachable();
    assumed = split.first();
  } else {
    const CacheBisection range(*config.gqa);
    for (const Index total : range.reachable()) {
      open.candidates.push_back(middle_candidate(*config.gqa, plain, total));
    }
    assumed = middle_candidate(*config.gqa, plain, range.over() ? range.whole() : range.next());
  }
  out.options = with_sizes(options, inputs, assumed);
  if (open.candidates.size() > 1 || open.weights_add_one) {
    out.open = std::move(open);
  }
  return out;
}

}  // namespace relatent
