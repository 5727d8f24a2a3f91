// What the fits know of one layer's attention.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "linalg/dtype.h"
#include "linalg/matrix.h"

namespace relatent {

// How much a fit looks at, and what it multiplies in.
struct SampleSize {
  Index count = 0;   // sequences
  Index length = 0;  // positions in each
  Index stride = 1;  // every how many-th position asks; at most length
  // bf16: the large products with x̃ and with o_proj are formed in bfloat16 and summed in float32. Needs
  // Backend::has_bf16.
  DType compute = DType::f32;

  Index per_sequence() const { return length / stride; }
};

// Sampled rows lie sequence by sequence.
struct AttentionSample : SampleSize {
  // Of the source: a head's query and key have head_dim numbers, and group_size heads read one key; an MLA
  // source has one key for all, rotary key and latent together.
  Index head_dim = 0;
  Index group_size = 1;
  float softcap = 0;  // of its scores, as attention.h has it
  // x̃ of one sequence on the converted stream, [length, D + 1]; it ends in 1, or in 0 where the converted
  // layer has no biases. Where the latents read normed heads (NormedHeads, model/attention.h), f in the place
  // of x.
  std::function<MatrixF(Index)> inputs;
  MatrixF sampled_inputs;  // [count * per_sequence, D + 1]
  MatrixD input_moment;    // E[x̃ x̃ᵀ] over the sampled rows, [D + 1, D + 1]
  // What the queries act on where that is not x̃: [x; 0] where they may have no bias, or the normalised latent
  // of a low-rank query with 1 or 0. Empty: the same as sampled_inputs and input_moment.
  MatrixF query_inputs;  // [count * per_sequence, Q + 1]
  MatrixD query_moment;  // [Q + 1, Q + 1]
  // With normed heads the query of head h acts on [q̂_h; 1 or 0] alone: query_inputs is [count * per_sequence,
  // H (d + 1)], head by head, and this, in the place of query_moment, [d + 1, d + 1] for each.
  std::vector<MatrixD> head_moments;
  MatrixF source_query;  // [count * per_sequence, H d], rotated, times the softmax scale
  MatrixF source_key;    // [count * length, K d], rotated
  // [count * per_sequence, D], what o_proj should put out so that the converted stream becomes the source's.
  MatrixF target;
  // The source's weights per sequence and block of queries. Empty: formed anew each time.
  std::vector<std::vector<MatrixF>> weights;
  VectorD value_spread;  // per head E_m Σ_n P_mn |O_h (v_n - Σ_n P_mn v_n)|² of the source; [H]

  bool by_head() const { return !head_moments.empty(); }
  // All that queries act on.
  const MatrixF& asked() const { return query_inputs.size() > 0 ? query_inputs : sampled_inputs; }
  // Some rows of what the query of a head acts on.
  auto asked(Index head, Index first_row, Index rows) const {
    const Index width = by_head() ? head_moments.front().cols() : asked().cols();
    return asked().block(first_row, by_head() ? head * width : 0, rows, width);
  }
  const MatrixD& asked_moment(Index head) const {
    if (by_head()) {
      return head_moments[static_cast<std::size_t>(head)];
    }
    return query_moment.size() > 0 ? query_moment : input_moment;
  }
  // Sequences start at different offsets, so that every position asks in some of them.
  Index position(Index sequence, Index i) const { return (sequence % stride) + (i * stride); }
};

// What is asked of a sample.
struct SampleOptions {
  Index stride = 1;
  bool affine = false;        // the converted layer may have biases
  bool query_affine = false;  // its queries too
  bool normed_heads = false;  // its latents read normed heads, as the source has them
  DType compute = DType::f32;
  std::size_t weight_bytes = 0;  // that the source's weights may take to be kept
};

}  // namespace relatent
