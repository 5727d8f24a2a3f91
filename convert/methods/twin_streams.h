// The source's and the converted model's residual streams side by side, one layer at a time: every layer is
// fitted to the stream that the converted layers before it really produce.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include "convert/compute/attention_sample.h"
#include "convert/compute/stream.h"
#include "convert/model/model.h"

namespace relatent {

class TwinStreams {
 public:
  // compute: of the samples (attention_sample.h).
  TwinStreams(const Model& source, const Sequences& sequences, DType compute = DType::f32);

  // Moves the source's stream past its attention and keeps what the fits need of it. The sample refers to
  // this object and to source, and is good until finish_attention. Of the options stride, biases and normed
  // heads count.
  AttentionSample sample_attention(const AttentionHalf& source, SampleOptions options);

  // Moves the source's stream past its attention, for layers that need no sample.
  void follow_source(const AttentionHalf& source);

  // Moves both streams past the source's attention.
  void carry_attention(const AttentionHalf& source);

  // Moves the converted stream past its attention. With `refit`, o_proj is first changed so that the stream
  // comes as near to the source's as ridge regression over all tokens brings it.
  void finish_attention(const AttentionHalf& source, LatentAttention& converted, bool refit, double ridge);

  // Moves both streams past the layer's MLP.
  void finish_layer(const MlpHalf& source);

  // Keeps both streams, which `layers` layers have been run through, in a file (state_file.h), or takes them
  // from there; how many layers then, nothing when the file is not there or not of these streams. Throw Error
  // (machine).
  void save(const std::filesystem::path& path, Index layers) const;
  std::optional<Index> load(const std::filesystem::path& path);

  const Stream& source() const { return source_; }
  const Stream& converted() const { return converted_; }

 private:
  Stream source_;
  Stream converted_;
  DType compute_;
};

}  // namespace relatent
