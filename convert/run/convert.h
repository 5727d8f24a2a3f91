// One checkpoint from options to written folder: the only place that knows the whole order.
//
//   const ConvertInputs inputs = open_inputs(options);
//   const auto work = claim_output(options, inputs);
//   const ConvertPlan plan = plan_conversion(options, inputs, work.get());
//   const ConvertReport report = convert(plan, inputs, *work, progress);
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "convert/methods/size_search.h"
#include "convert/model/layer_progress.h"
#include "convert/plan/plan.h"
#include "convert/run/measure.h"
#include "formats/work_folder.h"

namespace relatent {

struct ConvertReport {
  Index kv_rank = 0;
  Index rope_dim = 0;
  Index branches = 1;
  std::optional<Index> fold;  // transmla: the one used
  // Engines without biases: mean square, in the layer where it is largest, of what the nearest linear map of
  // the input misses of the biases of q, k and v, in units of theirs; 0 without biases.
  double fold_error = 0;
  // What the written checkpoint loses on calibration tokens; none without a calibration.
  std::optional<Measurement> measured;
  std::vector<std::string> warnings;  // beside the plan's: what only the result tells
  std::uint64_t bytes_read = 0;
  std::uint64_t bytes_written = 0;
};

// Makes the output's work folder, or takes up the one of an interrupted run of the same options: a name that
// is taken is refused at once. Throws Error as WorkFolder does.
std::unique_ptr<WorkFolder> claim_output(const ConvertOptions& options, const ConvertInputs& inputs);

// Plans, after trying sizes where the options leave them open. With a work folder trials outlive an
// interruption. watch, when given, hears of every pair of sizes that is tried. Throws Error: usage when
// options contradict each other or the source's sizes, input when the source holds something that has no
// place in the target (by name).
ConvertPlan plan_conversion(const ConvertOptions& options, const ConvertInputs& inputs,
                            WorkFolder* work = nullptr, const SizeSearch::Watch& watch = {});

// The plan of a dry run, from options, configs and headers: no weight is read and no size is tried. Where
// sizes are left to trials, ConvertPlan::open says which, and the plan is of the candidate in the middle or
// of the one that would be tried first. Throws Error as above.
ConvertPlan plan_without_trials(const ConvertOptions& options, const ConvertInputs& inputs);

// Converts and writes, once. The output folder appears under its name only when it is complete; on an error
// nothing is left, except for what --resume can go on from when the machine is to blame. Throws Error: input
// when the calibration belongs to another model or a weight is not finite, machine when writing fails.
ConvertReport convert(const ConvertPlan& plan, const ConvertInputs& inputs, WorkFolder& work,
                      const LayerProgress& progress);

}  // namespace relatent
