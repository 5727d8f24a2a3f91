#include "convert/compute/cpu/cpu_backend.h"

#include "convert/compute/cpu/forward.h"
#include "convert/compute/cpu/key_problem.h"
#include "convert/compute/cpu/latent_norm.h"
#include "convert/compute/cpu/logits.h"
#include "convert/compute/cpu/output_problem.h"
#include "convert/compute/cpu/query_problem.h"
#include "convert/compute/cpu/sample.h"
#include "linalg/packed.h"

namespace relatent {
namespace {

class CpuBackend final : public Backend {
 public:
  std::string_view name() const override { return "cpu"; }
  bool has_bf16() const override { return has_bf16_products(); }

  Layer load_layer(const Model& model, Index layer_idx, DType compute) const override {
    return compute == DType::bf16 ? model.packed_layer(layer_idx) : model.layer(layer_idx);
  }
  MlpHalf load_mlp(const Model& model, Index layer_idx, DType compute) const override {
    return compute == DType::bf16 ? model.packed_mlp_half(layer_idx) : model.mlp_half(layer_idx);
  }

  void add_attention(const AttentionHalf& half, Stream& stream) const override {
    relatent::add_attention(half, stream);
  }
  void add_attention(const RmsNorm& input_norm, std::span<const LatentAttention> parts,
                     const RmsNorm& output_norm, Stream& stream) const override {
    relatent::add_attention(input_norm, parts, output_norm, stream);
  }
  void add_mlp(const MlpHalf& half, Stream& stream) const override { relatent::add_mlp(half, stream); }
  LayerMoments observe(const Layer& layer, Stream& stream, bool last) const override {
    return relatent::observe(layer, stream, last);
  }
  LayerDifference run_side_by_side(const Layer& source, Stream& source_stream, const Layer& converted,
                                   Stream& converted_stream) const override {
    return relatent::run_side_by_side(source, source_stream, converted, converted_stream);
  }

  MatrixF logits(const Model& model, const Stream& stream, Index sequence) const override {
    return logits_of(model, stream, sequence);
  }
  LogitComparison compare_logits(const Model& source, const Stream& source_stream, const Model& converted,
                                 const Stream& converted_stream, const Sequences& sequences) const override {
    return relatent::compare_logits(source, source_stream, converted, converted_stream, sequences);
  }

  AttentionSample sample_attention(const AttentionHalf& source, const MatrixF& value_map,
                                   const SampleOptions& options, Stream& source_stream,
                                   const Stream& converted_stream) const override {
    return relatent::sample_attention(source, value_map, options, source_stream, converted_stream);
  }
  HeadOutputs head_outputs(const RmsNorm& input_norm, const LatentAttention& attention,
                           const RmsNorm& output_norm, const Stream& source_stream,
                           const Stream& converted_stream) const override {
    return relatent::head_outputs(input_norm, attention, output_norm, source_stream, converted_stream);
  }
  void add_outputs(const Linear& o, const MatrixF& head_outputs, const RmsNorm& output_norm,
                   Stream& stream) const override {
    relatent::add_outputs(o, head_outputs, output_norm, stream);
  }

  std::unique_ptr<QueryProblems> query_problems(const AttentionSample& sample, double ridge) const override {
    return make_query_problems(sample, ridge);
  }
  std::unique_ptr<FitProblem> key_problem(const AttentionSample& sample, const AbsorbedAttention& attention,
                                          double ridge, double score_weight) const override {
    return make_key_problem(sample, attention, ridge, score_weight);
  }
  std::unique_ptr<OutputProblem> output_problem(const AttentionSample& sample,
                                                const AbsorbedAttention& attention, double query_ridge,
                                                double key_ridge) const override {
    return make_output_problem(sample, attention, query_ridge, key_ridge);
  }
  std::uint64_t query_fit_bytes(Index heads, Index width, Index inputs,
                                const SampleSize& size) const override {
    return relatent::query_fit_bytes(heads, width, inputs, size);
  }

  std::uint64_t output_fit_bytes(Index heads, Index width, const FitInputs& inputs,
                                 const SampleSize& size) const override {
    return relatent::output_fit_bytes(heads, width, inputs, size);
  }

  MeanMoments mean_moments(const MatrixF& inputs, Index first, Index count) const override {
    return relatent::mean_moments(inputs, first, count);
  }
  SquareMoments square_moments(const MatrixF& map, const std::optional<CoordinateByHalf>& by_half,
                               const VectorD& least, const MatrixF& inputs) const override {
    return relatent::square_moments(map, by_half, least, inputs);
  }

  Eigenpairs<MatrixD> symmetric_eigenpairs(const MatrixD& a, std::optional<Index> k) const override {
    return relatent::symmetric_eigenpairs(a, k);
  }
  Eigenpairs<MatrixC> hermitian_eigenpairs(const MatrixC& a, std::optional<Index> k) const override {
    return relatent::hermitian_eigenpairs(a, k);
  }
  SymmetricRoot symmetric_root(const MatrixD& a, double floor) const override {
    return relatent::symmetric_root(a, floor);
  }
  MatrixD ridge_solve(const MatrixD& a, const MatrixD& b, double ridge) const override {
    return relatent::ridge_solve(a, b, ridge);
  }
};

}  // namespace

std::unique_ptr<const Backend> make_cpu_backend() {
  return std::make_unique<CpuBackend>();
}

}  // namespace relatent
