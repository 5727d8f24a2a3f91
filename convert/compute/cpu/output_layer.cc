#include "convert/compute/cpu/output_layer.h"

#include <Eigen/Dense>

namespace relatent {

OutputLayer::OutputLayer(const AttentionSample& sample_of, const AbsorbedAttention& layer)
    : sample(sample_of), attention(layer), rotations(layer.rotary, sample_of), key(layer.key.cast<float>()) {
  for (const MatrixD& up : layer.value_up) {
    value_up.emplace_back(up.cast<float>());
  }
  for (const LatentGroup& group : layer.groups) {
    for (const Heads heads : head_chunks({group.first_head, group.head_count})) {
      chunks.push_back({&group, heads, query_maps(sample, layer.query, 0, heads)});
    }
  }
}

OutputPart OutputLayer::part(const HeadChunk& chunk, std::size_t index, const MatrixF& z,
                             const MatrixF& queries) const {
  const LatentGroup& group = *chunk.group;
  const LatentPart& part = group.parts[index];
  const Index p = attention.rope_dim();
  const Index first = index == 0 ? 0 : part.first;
  const Index count = part.first + part.rank - first;
  return {part,
          first,
          count,
          keys_of_part(z, group, part),
          gather_queries(queries, chunk.heads.count, group, part, p),
          z.middleCols(p + group.first + first, count)};
}

MatrixF OutputLayer::keys_of_part(const MatrixF& z, const LatentGroup& group, const LatentPart& part) const {
  MatrixF out = gather_keys(z, group, part, attention.rope_dim(), group.first);
  if (sample.softcap == 0) {
    out.rowwise() -= out.colwise().mean().eval();
  }
  return out;
}

void OutputLayer::weights_of(const MatrixF& queries, const Eigen::Ref<const MatrixF>& keys,
                             const Block& block, MatrixF& weights, MatrixF& slope) const {
  weights.resize(queries.rows(), block.columns);
  weights.noalias() = queries * keys.transpose();
  if (sample.softcap > 0) {
    weights = (weights / sample.softcap).array().tanh();
    slope = 1 - weights.array().square();
    weights *= sample.softcap;
  }
  causal_softmax(sample, block, weights);
}

}  // namespace relatent
