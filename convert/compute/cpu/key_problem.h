// The fit of the key map of one layer, as a least-squares problem. As the backend's operation.
#pragma once

#include <memory>

#include "convert/compute/absorbed_attention.h"
#include "convert/compute/attention_sample.h"
#include "convert/compute/fit_problem.h"

namespace relatent {

std::unique_ptr<FitProblem> make_key_problem(const AttentionSample& sample,
                                             const AbsorbedAttention& attention, double ridge,
                                             double score_weight);

}  // namespace relatent
