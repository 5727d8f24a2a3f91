// A latent attention layer over the sampled queries, as what it puts out is formed of it.
#pragma once

#include <cstddef>
#include <vector>

#include "convert/compute/absorbed_attention.h"
#include "convert/compute/attention_sample.h"
#include "convert/compute/cpu/fit_blocks.h"
#include "linalg/matrix.h"

namespace relatent {

// The coordinates of a group that one of its parts hands on: the first part the shared ones too.
struct ValueColumns {
  Index first;
  Index count;
};
ValueColumns value_columns(const LatentGroup& group, std::size_t part);

// Heads of one group that are worked on at once.
struct HeadChunk {
  const LatentGroup* group = nullptr;
  Heads heads = {};
  QueryMaps queries;
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
  // The layer's own attention weights over a block, stacked; slope: of the cap on its scores, where there is
  // one.
  void weights_of(const MatrixF& queries, const Eigen::Ref<const MatrixF>& keys, const Block& block,
                  MatrixF& weights, MatrixF& slope) const;
};

}  // namespace relatent
