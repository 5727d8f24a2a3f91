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
  if (a.norm_rows.rows() > 0) {
    const VectorD y = a.norm_rows.cast<double>() * x.head(x.size() - 1);
    z.tail(a.rank()) /=
        std::sqrt(y.squaredNorm() / static_cast<double>(y.size()) + static_cast<double>(a.norm_eps));
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

inline const LatentGroup& group_of(const AbsorbedAttention& a, Index head) {
  return *std::find_if(a.groups.begin(), a.groups.end(), [&](const LatentGroup& group) {
    return head >= group.first_head && head < group.first_head + group.head_count;
  });
}

// [k^R; c_shared; c_b] of a key z.
inline VectorD key_of_part(const AbsorbedAttention& a, const LatentGroup& group, const LatentPart& part,
                           const VectorD& z) {
  const Index p = a.rope_dim();
  VectorD out(p + group.shared + part.rank);
  out << z.head(p), z.segment(p + group.first, group.shared),
      z.segment(p + group.first + part.first, part.rank);
  return out;
}

// [u^R; u^N_b] of a head's query u.
inline VectorD query_of_part(const AbsorbedAttention& a, const LatentGroup& group, const LatentPart& part,
                             const VectorD& u) {
  VectorD out(a.rope_dim() + group.shared + part.rank);
  out << u.head(a.rope_dim()), u.segment(part.query, group.shared + part.rank);
  return out;
}

// What the layer adds to the stream, [length, D].
inline MatrixD output_by_the_book(const AbsorbedAttention& a, const MatrixD& columns) {
  const std::vector<VectorD> keys = keys_by_the_book(a, columns);
  MatrixD out = a.o_bias.transpose().replicate(columns.cols(), 1);
  for (Index h = 0; h < a.heads(); ++h) {
    const LatentGroup& group = group_of(a, h);
    const Index w = a.v_dim();
    const MatrixD through = a.o.middleCols(h * w, w) * a.value_up[static_cast<std::size_t>(h)];
    for (std::size_t b = 0; b < group.parts.size(); ++b) {
      const LatentPart& part = group.parts[b];
      std::vector<VectorD> queries;
      std::vector<VectorD> read;
      std::vector<VectorD> values;
      for (Index m = 0; m < columns.cols(); ++m) {
        const VectorD& z = keys[static_cast<std::size_t>(m)];
        queries.push_back(query_of_part(a, group, part, query_by_the_book(a, h, m, columns.col(m))));
        read.push_back(key_of_part(a, group, part, z));
        // Shared coordinates come with the first part.
        VectorD value = VectorD::Zero(group.rank);
        if (b == 0) {
          value.head(group.shared) = z.segment(a.rope_dim() + group.first, group.shared);
        }
        value.segment(part.first, part.rank) = z.segment(a.rope_dim() + group.first + part.first, part.rank);
        values.push_back(value);
      }
      const MatrixD mixed = attend_by_the_book(
          columns.cols(), 0,
          [&](Index m, Index n) {
            return queries[static_cast<std::size_t>(m)].dot(read[static_cast<std::size_t>(n)]);
          },
          [&](Index n) -> VectorD { return values[static_cast<std::size_t>(n)]; });
      out += mixed * through.transpose();
    }
  }
  return out;
}

}  // namespace relatent::testing_support
