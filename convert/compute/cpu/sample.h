// What the fits of one layer need of both streams. As the backend's operations of these names.
#pragma once

#include "convert/compute/attention_sample.h"
#include "convert/compute/statistics.h"
#include "convert/compute/stream.h"
#include "convert/model/model.h"

namespace relatent {

AttentionSample sample_attention(const AttentionHalf& source, const MatrixF& value_map,
                                 const SampleOptions& options, Stream& source_stream,
                                 const Stream& converted_stream);
HeadOutputs head_outputs(const RmsNorm& input_norm, const LatentAttention& attention,
                         const Stream& source_stream, const Stream& converted_stream);
void add_outputs(const Linear& o, const MatrixF& head_outputs, Stream& stream);

// Forms the source's weights once for all fits when they take at most `bytes`.
void keep_weights(AttentionSample& sample, std::size_t bytes);

// Σ over the sample's queries: fills value_spread from the source's values [count * length, K v], group_size
// heads reading one of them, and what they do to the output, o [D, H v].
void measure_value_spread(const MatrixF& source_value, const MatrixF& o, AttentionSample& sample);

}  // namespace relatent
