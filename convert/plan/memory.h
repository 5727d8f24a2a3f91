// What a conversion takes, from config and options alone.
#pragma once

#include <cstdint>

#include "convert/compute/attention_sample.h"
#include "convert/engines/engine.h"
#include "convert/model/config.h"
#include "formats/npy.h"

namespace relatent {

// What the fits may keep of the source's attention weights.
inline constexpr std::size_t kept_weight_bytes = std::size_t{512} << 20U;

// Peak of one layer being converted, about, in bytes. moments: there is a calibration. absorbed: queries are
// formed that are as wide as what they read. output_values: of all tensors that are written for it.
std::uint64_t layer_memory(const ModelConfig& config, const LatentShape& shape, bool moments, bool absorbed,
                           std::uint64_t output_values);

// How many layers are converted side by side. At least one, at most one for each thread, and no more than
// keep the work below about 3 GiB.
Index layers_at_once(std::uint64_t bytes_per_layer);

// Bytes that the fits of one layer hold, about: the source's attention, the absorbed form and both second
// moments. output_fit: with that of queries and keys together.
std::uint64_t fit_memory(const ModelConfig& config, const LatentShape& shape, const SampleSize& size,
                         bool output_fit);

// Bytes that both residual streams and one layer's sample take, about; width = p + r.
std::uint64_t streams_memory(const ModelConfig& config, const Sequences& sequences, Index stride,
                             Index width);

// Bytes on the disk that the saved streams take, with those of the state before it, which they replace.
std::uint64_t streams_disk(const ModelConfig& config, const Sequences& sequences);

}  // namespace relatent
