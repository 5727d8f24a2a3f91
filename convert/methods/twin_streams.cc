#include "convert/methods/twin_streams.h"

#include "convert/compute/backend.h"
#include "convert/latent/from_mla.h"
#include "convert/latent/refit.h"
#include "convert/plan/memory.h"
#include "formats/state_file.h"
#include "linalg/stages.h"

namespace relatent {

TwinStreams::TwinStreams(const Model& source, const Sequences& sequences, DType compute)
    : source_(source, sequences), converted_(source_), compute_(compute) {}

void TwinStreams::save(const std::filesystem::path& path, Index layers) const {
  write_state(path, layers, {bytes_of(source_.hidden()), bytes_of(converted_.hidden())}).commit();
}

std::optional<Index> TwinStreams::load(const std::filesystem::path& path) {
  return read_state(path, {writable_bytes_of(source_.hidden()), writable_bytes_of(converted_.hidden())});
}

AttentionSample TwinStreams::sample_attention(const AttentionHalf& source, SampleOptions options) {
  const auto* gqa = std::get_if<GqaAttention>(&source.attention);
  const MatrixF latent_map =
      gqa != nullptr ? MatrixF() : mla_value_map(std::get<LatentAttention>(source.attention));
  options.compute = compute_;
  options.weight_bytes = kept_weight_bytes;
  return backend().sample_attention(source, gqa != nullptr ? gqa->o.weight : latent_map, options, source_,
                                    converted_);
}

void TwinStreams::follow_source(const AttentionHalf& source) {
  const Stage stage("sample");
  backend().add_attention(source, source_);
}

void TwinStreams::carry_attention(const AttentionHalf& source) {
  backend().add_attention(source, source_);
  backend().add_attention(source, converted_);
}

void TwinStreams::finish_attention(const AttentionHalf& source, LatentAttention& converted, bool refit,
                                   double ridge) {
  const Stage stage("refit");
  if (!refit) {
    backend().add_attention(source.input_norm, {&converted, 1}, source.attention_output_norm, converted_);
    return;
  }
  // What follows needs the head outputs again once o_proj is known.
  const RmsNorm& output_norm = source.attention_output_norm;
  const HeadOutputs heads =
      backend().head_outputs(source.input_norm, converted, output_norm, source_, converted_);
  refit_output(heads.sums, ridge, converted.o);
  backend().add_outputs(converted.o, heads.values, output_norm, converted_);
}

void TwinStreams::finish_layer(const MlpHalf& source) {
  backend().add_mlp(source, source_);
  backend().add_mlp(source, converted_);
}

}  // namespace relatent
