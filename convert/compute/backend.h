// The operations that cost time on tokens, behind one interface. The CPU (cpu/) is its only implementation.
//
// Every operation takes all sequences that there are: which of them are worked on at once, and in which
// pieces, is for the backend to choose. Nothing above multiplies matrices that have a row for every token.
// Results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "convert/compute/absorbed_attention.h"
#include "convert/compute/attention_sample.h"
#include "convert/compute/fit_problem.h"
#include "convert/compute/statistics.h"
#include "convert/compute/stream.h"
#include "convert/model/model.h"
#include "formats/calibration_store.h"
#include "linalg/decompose.h"

namespace relatent {

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;
  // Whether it can form products in bfloat16 and sum them in float32.
  virtual bool has_bf16() const = 0;

  // A layer as this backend multiplies with it; compute: f32, or bf16 where has_bf16(), for projections
  // that then have no weight that could be read. Throw as Model::layer does.
  virtual Layer load_layer(const Model& model, Index layer_idx, DType compute) const = 0;
  virtual MlpHalf load_mlp(const Model& model, Index layer_idx, DType compute) const = 0;

  // The forward pass. h += norm(o(heads(norm h))), here and below with the norms that there are.
  virtual void add_attention(const AttentionHalf& half, Stream& stream) const = 0;
  // h += norm(Σ o(heads(norm h))) over parts that share a layer's heads.
  virtual void add_attention(const RmsNorm& input_norm, std::span<const LatentAttention> parts,
                             const RmsNorm& output_norm, Stream& stream) const = 0;
  // h += norm(down(activation(gate(norm h)) * up(norm h)), times the sigmoid of the shared gate where there
  // is one, and what the experts of norm h add, where there are some).
  virtual void add_mlp(const MlpHalf& half, Stream& stream) const = 0;
  // Moments of a layer's input and where its attention goes. Moves the stream past the layer, but where
  // nothing follows it (`last`).
  virtual LayerMoments observe(const Layer& layer, Stream& stream, bool last) const = 0;
  // Moves two streams through a layer each.
  virtual LayerDifference run_side_by_side(const Layer& source, Stream& source_stream, const Layer& converted,
                                           Stream& converted_stream) const = 0;

  // All logits of one sequence: [length, vocab].
  virtual MatrixF logits(const Model& model, const Stream& stream, Index sequence) const = 0;
  // Logits are formed a slice of the vocabulary at a time and never stored.
  virtual LogitComparison compare_logits(const Model& source, const Stream& source_stream,
                                         const Model& converted, const Stream& converted_stream,
                                         const Sequences& sequences) const = 0;

  // Moves the source's stream past its attention and keeps what the fits need of it. value_map: what values
  // (of an MLA source, its latent) do to the output, [D, H v]. The sample refers to the converted stream.
  virtual AttentionSample sample_attention(const AttentionHalf& source, const MatrixF& value_map,
                                           const SampleOptions& options, Stream& source_stream,
                                           const Stream& converted_stream) const = 0;
  // The head outputs of the converted stream, and sums for o_proj from every so many-th token; with a norm
  // behind o_proj those of one Gauss-Newton step.
  virtual HeadOutputs head_outputs(const RmsNorm& input_norm, const LatentAttention& attention,
                                   const RmsNorm& output_norm, const Stream& source_stream,
                                   const Stream& converted_stream) const = 0;
  // h += norm(o(head outputs)).
  virtual void add_outputs(const Linear& o, const MatrixF& head_outputs, const RmsNorm& output_norm,
                           Stream& stream) const = 0;

  // The fits of queries and of the key map; the sample must outlive them, the attention a key problem. ridge:
  // added to the diagonal. score_weight: of score errors against value errors.
  virtual std::unique_ptr<QueryProblems> query_problems(const AttentionSample& sample,
                                                        double ridge) const = 0;
  virtual std::unique_ptr<FitProblem> key_problem(const AttentionSample& sample,
                                                  const AbsorbedAttention& attention, double ridge,
                                                  double score_weight) const = 0;
  // The layer's output by queries and keys together; sample and attention must outlive it.
  virtual std::unique_ptr<OutputProblem> output_problem(const AttentionSample& sample,
                                                        const AbsorbedAttention& attention,
                                                        double query_ridge, double key_ridge) const = 0;
  // Bytes that query_problems and a run of conjugate gradients hold beside sample and layer, about; the fit
  // of the keys takes less. Of each head's query [width, inputs].
  virtual std::uint64_t query_fit_bytes(Index heads, Index width, Index inputs,
                                        const SampleSize& size) const = 0;
  // The same of an output_problem; of each head's query [width, inputs.query], the key map [width,
  // inputs.key].
  virtual std::uint64_t output_fit_bytes(Index heads, Index width, const FitInputs& inputs,
                                         const SampleSize& size) const = 0;

  // Means over rows [first, first + count) of inputs.
  virtual MeanMoments mean_moments(const MatrixF& inputs, Index first, Index count) const = 0;
  // unit_j = 1 / (E[(map_j x̃)²] + least_j), or 0 where that is 0. map [n, D + 1], inputs [tokens, D + 1].
  virtual SquareMoments square_moments(const MatrixF& map, const std::optional<CoordinateByHalf>& by_half,
                                       const VectorD& least, const MatrixF& inputs) const = 0;

  // Dense algebra in float64, as linalg/decompose.h says.
  virtual Eigenpairs<MatrixD> symmetric_eigenpairs(const MatrixD& a, std::optional<Index> k = {}) const = 0;
  virtual Eigenpairs<MatrixC> hermitian_eigenpairs(const MatrixC& a, std::optional<Index> k = {}) const = 0;
  virtual SymmetricRoot symmetric_root(const MatrixD& a, double floor) const = 0;
  virtual MatrixD ridge_solve(const MatrixD& a, const MatrixD& b, double ridge) const = 0;
};

// The backend of this process: the CPU until another is set, which is done before anything else.
const Backend& backend();
void set_backend(std::unique_ptr<const Backend> chosen);

// Moves a stream through one layer.
inline void run_layer(const Layer& layer, Stream& stream) {
  backend().add_attention(layer, stream);
  backend().add_mlp(layer, stream);
}

}  // namespace relatent
