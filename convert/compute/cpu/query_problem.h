// The fit of the queries of one layer, as a least-squares problem. As the backend's operations.
#pragma once

#include <cstdint>
#include <memory>

#include "convert/compute/attention_sample.h"
#include "convert/compute/fit_problem.h"

namespace relatent {

std::unique_ptr<QueryProblems> make_query_problems(const AttentionSample& sample, double ridge);
std::uint64_t query_fit_bytes(Index heads, Index width, Index inputs, const SampleSize& size);

}  // namespace relatent
