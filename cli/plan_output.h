// What `convert --dry-run` prints.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "convert/plan/plan.h"

namespace relatent {

// "rotary 32 + latents 96", and how many of the latter are shared where some are.
std::string sizes_text(const CacheSizes& sizes);

// On stdout.
void print_plan(const ConvertPlan& plan);

// The same for programs.
nlohmann::ordered_json plan_json(const ConvertPlan& plan);

}  // namespace relatent
