// What the layer puts out, as a function of queries and keys.
#pragma once

#include <cstdint>
#include <memory>

#include "convert/compute/absorbed_attention.h"
#include "convert/compute/attention_sample.h"
#include "convert/compute/fit_problem.h"

namespace relatent {

// As Backend::output_problem.
std::unique_ptr<OutputProblem> make_output_problem(const AttentionSample& sample,
                                                   const AbsorbedAttention& attention, double query_ridge,
                                                   double key_ridge);

// As Backend::output_fit_bytes.
std::uint64_t output_fit_bytes(Index heads, Index width, const FitInputs& inputs, const SampleSize& size);

}  // namespace relatent
