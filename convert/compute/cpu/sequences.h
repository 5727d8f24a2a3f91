// How the sequences of a stream are dealt out to threads.
#pragma once

#include <algorithm>
#include <cstddef>

#include "linalg/matrix.h"
#include "linalg/threads.h"

namespace relatent {

// Sequences whose contributions are held before they are added up, one after the other. A function of their
// length alone, so that sums are formed in the same order for any thread count.
inline Index sequences_at_once(Index length) {
  constexpr Index batch_tokens = 8192;
  return std::max<Index>(1, batch_tokens / length);
}

// Calls body(sequence) in parallel for all of [0, count).
template <typename Body>
void for_sequences(Index count, const Body& body) {
  parallel_for(static_cast<std::size_t>(count), [&](std::size_t s) { body(static_cast<Index>(s)); });
}

}  // namespace relatent
