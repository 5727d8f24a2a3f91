// What can be asked of a config and of an opened model, all of it.
#pragma once

#include "convert/model/config.h"
#include "convert/model/model.h"

namespace relatent::fuzz {

void touch_config(const ModelConfig& config);
// Reads every layer; what the weights deserve is checked as fuzz::reads does.
void touch_model(const Model& model);

}  // namespace relatent::fuzz
