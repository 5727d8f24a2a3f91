// Streams through layers. As the backend's operations of these names.
#pragma once

#include <span>

#include "convert/compute/cpu/products.h"
#include "convert/compute/statistics.h"
#include "convert/compute/stream.h"
#include "convert/model/model.h"
#include "formats/calibration_store.h"

namespace relatent {

void add_attention(const AttentionHalf& half, Stream& stream);
void add_attention(const RmsNorm& input_norm, std::span<const LatentAttention> parts,
                   const RmsNorm& output_norm, Stream& stream);
void add_mlp(const MlpHalf& half, Stream& stream);
// The same for sequences [first, first + count), all at once: an expert is read once for all of them.
void add_mlp(const MlpHalf& half, Stream& stream, Index first, Index count);
LayerMoments observe(const Layer& layer, Stream& stream, bool last);
LayerDifference run_side_by_side(const Layer& source, Stream& source_stream, const Layer& converted,
                                 Stream& converted_stream);

}  // namespace relatent
