// What a conversion lost, in words for its user.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "convert/plan/plan.h"
#include "convert/run/measure.h"

namespace relatent {

// Warnings that only the result tells. fold_error: as ConversionMethod has it, 0 without biases.
std::vector<std::string> loss_warnings(const ConvertPlan& plan, const ConvertInputs& inputs,
                                       double fold_error, const std::optional<Measurement>& measured);

}  // namespace relatent
