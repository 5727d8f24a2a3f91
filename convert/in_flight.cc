#include "convert/in_flight.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "linalg/threads.h"

namespace relatent {
namespace {

constexpr std::uint64_t memory_in_flight = std::uint64_t{2} << 30U;

}  // namespace

Index layers_in_flight(std::uint64_t bytes_per_layer) {
  const std::uint64_t fit = memory_in_flight / std::max<std::uint64_t>(1, bytes_per_layer);
  return std::clamp<Index>(static_cast<Index>(fit), 1, std::max(1, num_threads()));
}

void for_layers(Index first_layer, Index layers, Index at_once, const std::function<Moments(Index)>& moments,
                const std::function<void(Index, Moments)>& body, const std::function<void(Index)>& finish) {
  for (Index first = first_layer; first < layers; first += at_once) {
    std::vector<Moments> known;
    for (Index i = first; i < std::min(layers, first + at_once); ++i) {
      known.push_back(moments(i));
    }
    parallel_for(known.size(),
                 [&](std::size_t i) { body(first + static_cast<Index>(i), std::move(known[i])); });
    for (std::size_t i = 0; i < known.size(); ++i) {
      finish(first + static_cast<Index>(i));
    }
  }
}

}  // namespace relatent
