// Layers that do not depend on each other, as many at a time as threads and memory allow.
#pragma once

#include <cstdint>
#include <functional>

#include "convert/latent/maps.h"
#include "linalg/matrix.h"

namespace relatent {

// At least one, at most one for each thread, and no more than keep the work below about 2 GiB.
Index layers_in_flight(std::uint64_t bytes_per_layer);

// For every layer from first_layer on moments(layer_idx), one after the other (the store they come from is
// not for several threads), body(layer_idx, moments) on several threads, and finish(layer_idx), one after the
// other and in order.
void for_layers(Index first_layer, Index layers, Index at_once, const std::function<Moments(Index)>& moments,
                const std::function<void(Index, Moments)>& body, const std::function<void(Index)>& finish);

}  // namespace relatent
