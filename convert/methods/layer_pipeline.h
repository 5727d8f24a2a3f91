// Layers that do not depend on each other, as many at a time as threads and memory allow.
#pragma once

#include <functional>

#include "convert/latent/maps.h"
#include "linalg/matrix.h"

namespace relatent {

// What is done for every layer.
struct LayerWork {
  // One at a time: the store that moments come from is not for several threads.
  std::function<Moments(Index)> moments;
  // Of several layers at once.
  std::function<void(Index, Moments)> body;
  // One at a time and in the order of the layers, beside the body of later ones.
  std::function<void(Index)> finish;
  // Once, beside all of that; on the only thread, before it. May be empty.
  std::function<void()> beside = {};
};

// Does the work for the layers from first_layer on. Between the moments and the end of finish there are never
// more than at_once. The first exception ends it all.
void run_layer_pipeline(Index first_layer, Index layers, Index at_once, const LayerWork& work);

}  // namespace relatent
