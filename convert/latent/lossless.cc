#include "convert/latent/lossless.h"

namespace relatent {

Rotary lossless_rotary(const Rotary& source, Index kv_heads) {
  Rotary out;
  out.attention_factor = source.attention_factor;
  for (Index g = 0; g < kv_heads; ++g) {
    out.inv_freq.insert(out.inv_freq.end(), source.inv_freq.begin(), source.inv_freq.end());
  }
  return out;
}

RotaryKey lossless_rotary_key(const LayerMaps& maps) {
  const Index d = maps.head_dim;
  const Index half = maps.pairs();
  const Index p = maps.key_dim();
  RotaryKey out;
  out.read = MatrixD::Zero(p, p);
  out.rotary = lossless_rotary(maps.rotary, maps.kv_heads);
  for (Index g = 0; g < maps.kv_heads; ++g) {
    for (Index f = 0; f < half; ++f) {
      const Index pair = g * half + f;
      out.read(pair, g * d + f) = 1;
      out.read(pair + p / 2, g * d + f + half) = 1;
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

JointLatent lossless_latent(const LayerMaps& maps, Index first_head, Index head_count) {
  const Index d = maps.head_dim;
  JointLatent out;
  out.first_head = first_head;
  out.head_count = head_count;
  out.first_kv_head = maps.group_of(first_head);
  const Index rank = (maps.group_of(first_head + head_count - 1) + 1 - out.first_kv_head) * d;
  out.down = maps.v.middleRows(out.first_kv_head * d, rank);
  out.key_up = MatrixD::Zero(0, rank);
  out.value_up = MatrixD::Identity(rank, rank);
  out.value_shift = VectorD::Zero(rank);
  out.key_rank = 0;
  return out;
}

JointLatent lossless_latent(const LayerMaps& maps) {
  return lossless_latent(maps, 0, maps.heads);
}

}  // namespace relatent
