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
                         const RmsNorm& output_norm, const Stream& source_stream,
                         const Stream& converted_stream);
void add_outputs(const Linear& o, const MatrixF& head_outputs, const RmsNorm& output_norm, Stream& stream);

// A norm behind o_proj: N(y) = g ∘ y / ρ(y), ρ the root mean square. To first order a change δ of y moves the
// stream by g ∘ δ / ρ (but for the part along y, which the norm takes away), so what brings the stream by e
// nearer is δ = ρ e / g. Where a gain is small that would be a long way for little, so it is
//   δ = ρ g ∘ e / (g² + least), least = small_gain mean(g²).
struct NormStep {
  RowVectorF factor;  // g / (g² + least); empty without a norm
  float eps = 0;

  explicit NormStep(const RmsNorm& norm);
  bool present() const { return factor.size() > 0; }
  // ρ of a row.
  float root(const RowVectorF& y) const;
};

// Forms the source's weights once for all fits when they take at most `bytes`.
void keep_weights(AttentionSample& sample, std::size_t bytes);

// Σ over the sample's queries: fills value_spread from the source's values [count * length, K v], group_size
// heads reading one of them, and what they do to the output, o [D, H v].
void measure_value_spread(const MatrixF& source_value, const MatrixF& o, AttentionSample& sample);

}  // namespace relatent
