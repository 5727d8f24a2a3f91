// Absorbed latent layers, and what attention_fit.h compares them by, in double precision and one number at a
// time.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "convert/latent/absorbed.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/joint_latent.h"
#include "convert/latent/rotary_key.h"
#include "tests/support/reference.h"
#include "tests/support/samples.h"

namespace relatent::testing_support {

// The rotary key of `pairs` components that the expected rotation chooses.
inline RotaryKey concentrated_key(const LayerSample& sample, Index pairs) {
  const DroppedRotation dropped = expected_rotation(sample.maps, sample.moments);
  const Concentration concentration = concentrate(sample.maps, sample.moments, dropped);
  return rotary_key(sample.maps, concentration, dropped, allocate_components({concentration}, 2 * pairs));
}

inline AbsorbedAttention absorbed_layer(const LayerSample& sample, Index pairs, Index rank) {
  const RotaryKey key = concentrated_key(sample, pairs);
  return absorb(sample.maps, key, joint_latent(sample.maps, sample.moments, key, {.rank = rank}));
}

// z of the token x̃ at a position.
inline VectorD key_by_the_book(const AbsorbedAttention& a, Index position, const VectorD& x) {
  const Index p = a.rope_dim();
  VectorD z = a.key * x;
  if (a.norm.present()) {
    VectorD y(a.norm.square.size());
    y << z.tail(a.rank()), a.norm.extra * x;
    z.tail(a.rank()) /= std::sqrt(a.norm.square.dot(y.cwiseAbs2()));
  }
  const VectorD rotary = z.head(p);
  z.head(p) = rotated(a.rotary, position, rotary);
  return z;
}

// u of one head.
inline VectorD query_by_the_book(const AbsorbedAttention& a, Index head, Index position, const VectorD& x) {
  VectorD u = a.query[static_cast<std::size_t>(head)] * x;
  const VectorD rotary = u.head(a.rope_dim());
  u.head(a.rope_dim()) = rotated(a.rotary, position, rotary);
  return u;
}

// z of every column of a sequence x̃ [D + 1, length].
inline std::vector<VectorD> keys_by_the_book(const AbsorbedAttention& a, const MatrixD& columns) {
  std::vector<VectorD> out;
  for (Index n = 0; n < columns.cols(); ++n) {
    out.push_back(key_by_the_book(a, n, columns.col(n)));
  }
  return out;
}

// What the layer adds to the stream, [length, D].
inline MatrixD output_by_the_book(const AbsorbedAttention& a, const MatrixD& columns) {
  const std::vector<VectorD> keys = keys_by_the_book(a, columns);
  MatrixD out = a.o_bias.transpose().replicate(columns.cols(), 1);
  for (Index h = 0; h < a.heads(); ++h) {
    std::vector<VectorD> queries;
    for (Index m = 0; m < columns.cols(); ++m) {
      queries.push_back(query_by_the_book(a, h, m, columns.col(m)));
    }
    const MatrixD mixed = attend_by_the_book(
        columns.cols(), 0,
        [&](Index m, Index n) {
          return queries[static_cast<std::size_t>(m)].dot(keys[static_cast<std::size_t>(n)]);
        },
        [&](Index n) -> VectorD { return keys[static_cast<std::size_t>(n)].tail(a.rank()); });
    const Index w = a.v_dim();
    out += mixed * (a.o.middleCols(h * w, w) * a.value_up[static_cast<std::size_t>(h)]).transpose();
  }
  return out;
}

}  // namespace relatent::testing_support
