#include "convert/compute/cpu/output_layer.h"

#include <Eigen/Dense>

namespace relatent {

ValueColumns value_columns(const LatentGroup& group, std::size_t part) {
  const LatentPart& p = group.parts[part];
  return part == 0 ? ValueColumns{0, p.first + p.rank} : ValueColumns{p.first, p.rank};
}

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
  for (Index i = 0; i < weights.rows(); ++i) {
    const Index seen = sample.position(block.sequence, block.first + (i % block.rows)) + 1;
    auto row = weights.row(i).head(seen).array();
    row = (row - row.maxCoeff()).exp();
    row *= 1.0F / row.sum();
    weights.row(i).tail(weights.cols() - seen).setZero();
  }
}

}  // namespace relatent
