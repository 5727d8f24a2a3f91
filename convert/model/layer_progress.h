// How those who wait are told of layers that are done.
#pragma once

#include <functional>

#include "linalg/matrix.h"

namespace relatent {

// Called after each layer with (layers done, layers in all).
using LayerProgress = std::function<void(Index, Index)>;

}  // namespace relatent
