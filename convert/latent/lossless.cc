#include "convert/latent/lossless.h"

namespace relatent {

RotaryKey lossless_rotary_key(const LayerMaps& maps) {
  const Index d = maps.head_dim;
  const Index half = maps.pairs();
  const Index p = maps.key_dim();
  RotaryKey out;
  out.read = MatrixD::Zero(p, p);
  out.rotary.attention_factor = maps.rotary.attention_factor;
  for (Index g = 0; g < maps.kv_heads; ++g) {
    for (Index f = 0; f < half; ++f) {
      const Index pair = g * half + f;
      out.read(pair, g * d + f) = 1;
      out.read(pair + p / 2, g * d + f + half) = 1;
      out.rotary.inv_freq.push_back(maps.rotary.inv_freq[static_cast<std::size_t>(f)]);
    }
  }
  out.residual = MatrixD::Zero(0, p);
  for (Index h = 0; h < maps.heads; ++h) {
    // The read map of the head's own group, acting on the query instead.
    out.query.emplace_back(out.read.middleCols(maps.group_of(h) * d, d));
    out.content_query.emplace_back(MatrixD::Zero(0, d));
  }
  return out;
}

JointLatent lossless_latent(const LayerMaps& maps) {
  const Index rank = maps.key_dim();
  return {maps.v, MatrixD::Zero(0, rank), MatrixD::Identity(rank, rank), VectorD::Zero(rank)};
}

}  // namespace relatent
