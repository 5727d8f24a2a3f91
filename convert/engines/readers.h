// Who runs a checkpoint as it lies on the disk.
#pragma once

#include <string>
#include <vector>

#include "convert/model/config.h"

namespace relatent {

// One line for each engine that is known to run a latent checkpoint, with what it takes, and for those that
// would refuse it only for its sizes. Empty for grouped-query models.
std::vector<std::string> readers_of(const ModelConfig& config);

}  // namespace relatent
