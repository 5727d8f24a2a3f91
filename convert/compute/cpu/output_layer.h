// A latent attention layer over the sampled queries, as what it puts out is formed of it.
#pragma once

#include <cstddef>
#include <vector>

#include "convert/compute/absorbed_attention.h"
#include "convert/compute/attention_sample.h"
#include "convert/compute/cpu/fit_blocks.h"
#include "linalg/matrix.h"

namespace relatent {

// Heads of one group that are worked on at once.
struct HeadChunk {
  const LatentGroup* group = nullptr;
  Heads heads = {};
  QueryMaps queries;
};

// What one part of a group's latent does for a chunk of heads in one sequence.
struct OutputPart {
  const LatentPart& part;
  // The group's coordinates that it hands on: the first part the shared ones too.
  Index first;
  Index count;
  MatrixF keys;                       // as keys_of_part has them
  MatrixF asked;                      // [queries, heads * (p + shared + part)]
  Eigen::Ref<const MatrixF> content;  // those coordinates of every token, a view of z
};

// Its maps in float32. Sample and attention must outlive it.
struct OutputLayer {
  OutputLayer(const AttentionSample& sample_of, const AbsorbedAttention& layer);

  const AttentionSample& sample;
  const AbsorbedAttention& attention;
  SampleRotations rotations;
  MatrixF key;
  std::vector<MatrixF> value_up;
  std::vector<HeadChunk> chunks;  // of all groups

  // The columns of z that a part's scores read; without a cap on scores, less what all keys of the sequence
  // have in common: that shifts scores alike, and would drown the rest in rounding.
  MatrixF keys_of_part(const MatrixF& z, const LatentGroup& group, const LatentPart& part) const;
  // z of one sequence, which must outlive the result, and the queries of a chunk's heads.
  OutputPart part(const HeadChunk& chunk, std::size_t index, const MatrixF& z, const MatrixF& queries) const;
  // The layer's own attention weights over a block, stacked; slope: of the cap on its scores, where there is
  // one.
  void weights_of(const MatrixF& queries, const Eigen::Ref<const MatrixF>& keys, const Block& block,
                  MatrixF& weights, MatrixF& slope) const;
};

}  // namespace relatent
