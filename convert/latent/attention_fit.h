// Least-squares fits of one latent layer to the source's attention on the calibration tokens: closed forms
// and a few conjugate-gradient steps on linear systems. No gradients are followed and nothing is trained.
//
// All of them compare a sample of queries m with all keys n under the source's own attention weights P_mn.
// Scores matter up to a constant per query, so the error of a head's scores is the within-query variance
//   J_h = E_m Σ_n P_mn ((s_mn - u_m·z_n) - mean_m)²,
// s being the source's scores and u·z the converted ones (absorbed.h). u = query[h] x̃ is linear in query[h]
// and z = key x̃ in key: each is a linear least-squares problem while the other rests. The expected rotation
// γ of rotary_key.h is the best single number per frequency; this finds the best linear map.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "convert/latent/absorbed.h"
#include "linalg/dtype.h"
#include "linalg/matrix.h"
#include "linalg/packed.h"

namespace relatent {

struct FitOptions {
  bool queries = true;
  bool keys = true;
  bool refit = true;  // o_proj, on every token once the layer is fitted (sequential.h)
  Index rounds = 2;   // queries and keys in turn; the last round ends with the queries
  Index steps = 2;    // conjugate-gradient steps of a fit; the queries take one before the last round
  Index tokens = 0;   // of the calibration that are used, whole sequences from the first; 0 = all
  Index stride = 8;   // every how many-th position of a sequence asks
  Index queries_per_unknown = 8;  // the stride shrinks until there are so many, or none is left out
  // Ridges, against the mean square of what the fitted map reads. Fewer queries than unknowns raise them.
  double query_ridge = 0.3;
  double key_ridge = 0.1;
  double output_ridge = 0.1;
  double score_weight = 0.3;  // of score errors against value errors when the keys are fitted

  // The stride that `count` tokens allow for inputs of this size.
  Index stride_for(Index count, Index hidden_size) const {
    return std::clamp<Index>(count / (queries_per_unknown * (hidden_size + 1)), 1, stride);
  }
};

// How much a fit looks at, and what it multiplies in.
struct SampleSize {
  Index count = 0;   // sequences
  Index length = 0;  // positions in each
  Index stride = 1;  // at most length
  // bf16: the large products with x̃ and with o_proj are formed in bfloat16 and summed in float32. Needs
  // has_bf16_products().
  DType compute = DType::f32;

  Index per_sequence() const { return length / stride; }
};

// What the fits know of one layer's attention. Sampled rows lie sequence by sequence.
struct AttentionSample : SampleSize {
  // Of the source: a head's query and key have head_dim numbers, and group_size heads read one key; an MLA
  // source has one key for all, rotary key and latent together.
  Index head_dim = 0;
  Index group_size = 1;
  // x̃ of one sequence on the converted stream, [length, D + 1]; it ends in 1, or in 0 where the converted
  // layer has no biases.
  std::function<MatrixF(Index)> inputs;
  MatrixF sampled_inputs;  // [count * per_sequence, D + 1]
  MatrixD input_moment;    // E[x̃ x̃ᵀ] over the sampled rows, [D + 1, D + 1]
  // What the queries act on where that is not x̃: [x; 0] where they may have no bias, or the normalised latent
  // of a low-rank query with 1 or 0. Empty: the same as sampled_inputs and input_moment.
  MatrixF query_inputs;  // [count * per_sequence, Q + 1]
  MatrixD query_moment;  // [Q + 1, Q + 1]
  MatrixF source_query;  // [count * per_sequence, H d], rotated, times the softmax scale
  MatrixF source_key;    // [count * length, K d], rotated
  MatrixF target;        // [count * per_sequence, D], what the attention should add to the converted stream
  // The source's weights per sequence and block of queries (keep_weights). Empty: formed anew each time.
  std::vector<std::vector<MatrixF>> weights;
  VectorD value_spread;  // per head E_m Σ_n P_mn |O_h (v_n - Σ_n P_mn v_n)|² of the source; [H]

  const MatrixF& asked() const { return query_inputs.size() > 0 ? query_inputs : sampled_inputs; }
  const MatrixD& asked_moment() const { return query_moment.size() > 0 ? query_moment : input_moment; }
  // Sequences start at different offsets, so that every position asks in some of them.
  Index position(Index sequence, Index i) const { return (sequence % stride) + (i * stride); }
};

// Forms the source's weights once for all fits when they take at most `bytes`.
void keep_weights(AttentionSample& sample, std::size_t bytes);

// Σ over the sample's queries: fills value_spread from the source's values [count * length, K v], group_size
// heads reading one of them, and what they do to the output, o [D, H v].
void measure_value_spread(const MatrixF& source_value, const MatrixF& o, AttentionSample& sample);

struct ScoreError {
  double before = 0;  // mean of J_h over heads
  double after = 0;   // the same by the fitted quadratic
};

// The fit of the queries of one layer; what its preconditioner knows of the inputs serves every call.
class QueryFit {
 public:
  // The sample must outlive the fit.
  QueryFit(const AttentionSample& sample, const FitOptions& options);
  // Bytes that it holds beside sample and layer, about; the fit of the keys takes less. Of each head's query
  // [width, inputs]; count, length, stride and compute as in the sample.
  static std::uint64_t memory(Index heads, Index width, Index inputs, const SampleSize& size);
  // Changes every query[h]. Throws NumericalError when the sample holds NaN.
  ScoreError operator()(Index steps, AbsorbedAttention& attention) const;

 private:
  const AttentionSample& sample_;
  double ridge_;
  ProductMap inputs_;                        // (asked_moment + ridge)⁻¹
  std::vector<PackedWeight> packed_inputs_;  // of the sequences that are added up at once, for bfloat16
};
ScoreError fit_queries(const AttentionSample& sample, const FitOptions& options,
                       AbsorbedAttention& attention);

// Changes rotary key and latent together, against scores (per head weighed by value_spread) and against the
// layer's output under the source's weights.
void fit_keys(const AttentionSample& sample, const FitOptions& options, AbsorbedAttention& attention);

// The alternation. It ends with queries of any rank: to_latent_attention brings them down. before is what the
// closed forms left, after what the last fit of the queries leaves.
ScoreError fit_attention(const AttentionSample& sample, const FitOptions& options,
                         AbsorbedAttention& attention);

}  // namespace relatent
