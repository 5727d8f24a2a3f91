// Threads for independent pieces of work.
//
// Every result is the same for any thread count: work is cut into pieces by the caller, each piece runs on
// one thread with a single-threaded BLAS, and nothing is summed in the order in which pieces finish.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace relatent {

// Number of threads that parallel_for uses; 0 restores the default (all cores). Not thread-safe: set it at
// start.
void set_num_threads(int threads);
int num_threads();

// Where there is a limit on address space, starts the program again without OpenBLAS's own threads, which the
// library begins before main: each takes one of the buffers below when it gets to it, and nobody can tell
// whether it has. Called first of all; returns where there is no need, or no way.
void restart_without_blas_threads(char** arguments);

// Why OpenBLAS would wait for ever: it takes a large buffer for every thread that calls it, and tries again
// and again where the limit on address space (ulimit -v) denies it. A sentence, empty when there is no such
// limit or room for `threads` buffers more. When there is one the program should end without running the
// libraries' own ends (std::_Exit): a thread of OpenBLAS may be waiting already.
std::string why_blas_would_hang(int threads);
// Has OpenBLAS take so many buffers now, where there is such a limit, so that what else the program asks for
// cannot make them want. Only when there is room for them.
void take_blas_buffers(int threads);

// Calls body(i) for every i in [0, pieces), in any order, from up to num_threads() threads, and returns when
// all are done. The first exception thrown by a piece is rethrown; pieces not yet begun are then skipped.
// Calls from inside a piece run serially.
void parallel_for(std::size_t pieces, const std::function<void(std::size_t)>& body);

// {make(0), make(1), ...}, made as by parallel_for. What make returns must be movable.
template <typename Make>
auto parallel_made(std::size_t count, const Make& make) {
  using Made = decltype(make(std::size_t{}));
  std::vector<std::optional<Made>> made(count);
  parallel_for(count, [&](std::size_t i) { made[i].emplace(make(i)); });
  std::vector<Made> out;
  out.reserve(count);
  for (std::optional<Made>& one : made) {
    out.push_back(std::move(*one));
  }
  return out;
}

}  // namespace relatent
