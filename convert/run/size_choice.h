// Sizes that the options leave open, chosen by what they lose on held-out calibration tokens.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "convert/methods/size_search.h"
#include "convert/plan/plan.h"
#include "formats/work_folder.h"

namespace relatent {

struct SizeChoice {
  ConvertOptions options;         // with the sizes
  std::vector<SizeTrial> trials;  // none where nothing was to be chosen
  std::optional<OpenSizes> open;  // without trials: what they would choose from; none = nothing
  std::vector<std::string> warnings;
};

// options: completed (plan.h). Trials are recorded in the work folder, if there is one, and those recorded
// there are not made again. Throws Error (usage) when options contradict each other.
SizeChoice choose_sizes_by_trials(const ConvertOptions& options, const ConvertInputs& inputs,
                                  WorkFolder* work, const SizeSearch::Watch& watch);

// The same for a calibration that was checked already, which reads every weight.
SizeChoice search_sizes(const ConvertOptions& options, const ConvertInputs& inputs, WorkFolder* work,
                        const SizeSearch::Watch& watch);

// The trial that such a search begins with, where --per-device is given: for comparing forms. Recorded
// likewise, and the calibration is not checked.
SizeTrial try_first_sizes(const ConvertOptions& options, const ConvertInputs& inputs, WorkFolder* work,
                          const SizeSearch::Watch& watch);

// Without any trial, from headers alone: the candidate in the middle where all of them would be tried, else
// the one that would be tried first. Throws Error (usage) as above.
SizeChoice assume_sizes(const ConvertOptions& options, const ConvertInputs& inputs);

}  // namespace relatent
