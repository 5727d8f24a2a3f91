// What the fits of queries and of keys share: the sampled queries of a sequence in blocks, the source's
// attention weights over them, and how the work is cut into pieces.
#pragma once

#include <algorithm>
#include <functional>
#include <span>
#include <vector>

#include "convert/compute/absorbed_attention.h"
#include "convert/compute/attention_sample.h"
#include "convert/compute/cpu/sequences.h"
#include "convert/compute/fit_problem.h"
#include "convert/model/rotary.h"
#include "linalg/matrix.h"
#include "linalg/packed.h"
#include "linalg/threads.h"

namespace relatent {

// Every how many-th sequence tells how keys and values vary, which only weighs and preconditions.
inline constexpr Index moment_sequences = 4;

// The heads that are worked on at once: a piece of work is one sequence and one of these. Each has this many,
// the last one perhaps fewer.
inline constexpr Index chunk_heads = 4;
std::vector<Heads> head_chunks(Heads heads);

Index source_heads(const AttentionSample& sample);

// Rotations of all positions, and of the sampled ones for each offset at which a sequence may start.
struct SampleRotations {
  RotaryTable all;
  std::vector<RotaryTable> sampled;

  SampleRotations(const Rotary& rotary, const AttentionSample& sample);
  const RotaryTable& of(Index sequence) const {
    return sampled[static_cast<std::size_t>(sequence) % sampled.size()];
  }
};

RotaryTable reversed(RotaryTable table);

// z of one sequence: [length, p + latent]. `shrink`, when not empty, multiplies the latent of every token.
MatrixF keys_of(const MatrixF& x, const MatrixF& key, const VectorF& shrink, const RotaryTable& table,
                Index p);

// The queries of some heads as maps of what they act on: one for all of them, stacked, or one for each.
struct QueryMaps {
  Heads heads;
  Index width = 0;  // numbers of a head's query
  std::vector<ProductMap> maps;
};
// queries: of all heads from `first_head` on.
QueryMaps query_maps(const AttentionSample& sample, const Systems& queries, Index first_head, Heads heads);

// u of one sequence's sampled rows for all heads of `queries`: [per_sequence, heads * width].
MatrixF queries_of(const AttentionSample& sample, Index sequence, const QueryMaps& queries,
                   const SampleRotations& rotations);

// Columns of z that the scores of a part read; the group's latent starts `first` columns after the rotary
// key.
MatrixF gather_keys(const MatrixF& z, const LatentGroup& group, const LatentPart& part, Index p, Index first);

// Rows of several heads' queries that belong to a part: [rows, heads * (p + shared + part)].
MatrixF gather_queries(const MatrixF& u, Index heads, const LatentGroup& group, const LatentPart& part,
                       Index p);

// Adds the gradient by a part's keys to that by its group's: rotary key, then the group's latent.
void scatter_keys(const MatrixF& by_keys, const LatentGroup& group, const LatentPart& part, Index p,
                  MatrixF& sum);

// Adds the gradient by a part's queries to that by the heads' whole queries.
void scatter_queries(const MatrixF& gradient, Index heads, const LatentGroup& group, const LatentPart& part,
                     Index p, MatrixF& sum);

// Gradients by the keys of one sequence, each [length, p + its group's rank], as one by the key map: [p + r,
// D + 1]. shrink: as keys_of has it; x: the sequence's inputs.
struct KeyGradient {
  const LatentGroup* group;
  const MatrixF* by_keys;
};
MatrixF key_map_gradient(const AbsorbedAttention& attention, const std::vector<KeyGradient>& gradients,
                         const RotaryTable& table, const VectorF& shrink, const MatrixF& x);

// The maps of several heads, one under the other, in float32.
MatrixF stacked(const Systems& maps, Heads heads);

// Some of one sequence's sampled queries. What belongs to several heads is stacked by head: row h rows + i of
// such a matrix is query first + i of the h-th of them, so that one product serves all heads of a block.
struct Block {
  Index sequence;
  Index first;
  Index rows;
  Index columns;  // keys that the last of them sees
};
std::vector<Block> blocks_of(const AttentionSample& sample, Index sequence);

// by_query [queries, heads * w] -> [heads * rows, w].
void stack_heads(const MatrixF& by_query, const Block& block, Index heads, MatrixF& out);
void unstack_heads(const MatrixF& stack, const Block& block, Index heads, MatrixF& by_query);

// The source's logits, [heads * rows, columns].
void source_logits(const AttentionSample& sample, const Block& block, Heads heads, MatrixF& logits);

// Stacked scores of a block to their softmax under the causal mask.
void causal_softmax(const AttentionSample& sample, const Block& block, MatrixF& scores);

// The source's weights, formed.
void form_weights(const AttentionSample& sample, const Block& block, Heads heads, MatrixF& weights);
// The same as the sample keeps it, or else formed in scratch.
Eigen::Ref<const MatrixF> source_weights(const AttentionSample& sample, const Block& block, Heads heads,
                                         MatrixF& scratch);

// scores -> weights ∘ (scores - Σ weights scores); returns Σ weights (scores - mean)².
double centre(const Eigen::Ref<const MatrixF>& weights, Eigen::Ref<MatrixF> scores);

// How many of `count` are left when only every step-th is taken.
inline Index every(Index count, Index step) {
  return (count + step - 1) / step;
}

// Calls piece(i, part, slot) in parallel for all parts of `batch` items at a time, and then
// add(first item, slots of those items, part after part) by one thread.
template <typename Slot, typename Piece, typename Add>
void in_batches(Index count, Index parts, Index batch, const Piece& piece, const Add& add) {
  for (Index first = 0; first < count; first += batch) {
    std::vector<Slot> slots(static_cast<std::size_t>(std::min(batch, count - first) * parts));
    parallel_for(slots.size(), [&](std::size_t i) {
      const auto at = static_cast<Index>(i);
      piece(first + at / parts, at % parts, slots[i]);
    });
    add(first, slots);
  }
}

// Rows of a map that one piece of work takes.
inline constexpr Index slice_rows = 128;
// Calls body(system, first row, rows) in parallel for slices of every system.
template <typename Body>
void for_slices(const Systems& systems, const Body& body) {
  struct Slice {
    std::size_t system;
    Index first;
    Index rows;
  };
  std::vector<Slice> slices;
  for (std::size_t i = 0; i < systems.size(); ++i) {
    for (Index first = 0; first < systems[i].rows(); first += slice_rows) {
      slices.push_back({i, first, std::min(slice_rows, systems[i].rows() - first)});
    }
  }
  parallel_for(slices.size(),
               [&](std::size_t i) { body(slices[i].system, slices[i].first, slices[i].rows); });
}

// Ridge of the preconditioners on the side of the scores, and what it leaves of a moment.
struct ScoreSide {
  MatrixD moment;  // the ridge inside
  MatrixD inverse;
};
ScoreSide score_side(MatrixD moment);

// (moment + added I)⁻¹, rounded: it only says where conjugate gradients look first.
ProductMap input_side(const MatrixD& moment, double added, DType compute);

// scores⁻¹ residual inputs of every system; inputs: the input_side of one.
Systems precondition(const std::vector<ScoreSide>& scores, const Systems& residual,
                     const std::function<const ProductMap&(std::size_t)>& inputs);
// image += ridge moment direction, of every system; ridges: one for all, or one for each.
void add_ridge(const std::vector<ScoreSide>& scores, std::span<const double> ridges, const Systems& direction,
               Systems& image);

// Σ_h score_weight_h E[u uᵀ] + value_weight_h value_upᵀ Oᵀ O value_up, [p + r, p + r]: the curvature seen by
// one token's key.
MatrixD key_curvature(const AttentionSample& sample, const AbsorbedAttention& attention,
                      const VectorD& score_weight, const VectorD& value_weight);

// The coordinates of a pair turn into one another, so they weigh the same, and none correlates with the
// latent once the pair has turned.
void average_pairs(MatrixD& moment, Index p);

}  // namespace relatent
