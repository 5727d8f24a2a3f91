// From the order in which a checkpoint has the rows of queries and keys to that which the program works on.
#pragma once

#include "convert/model/attention.h"
#include "convert/model/config.h"

namespace relatent {

// Whether rows are read as they lie: every coordinate rotates, as halves.
inline bool has_plain_heads(const GqaGeometry& geometry) {
  return geometry.rotary_dim == geometry.head_dim && !geometry.rope_interleave;
}

// Reorders the rows of a projection of heads: pair i of the rotating part, (i, i + R/2) or (2i, 2i + 1),
// becomes (i, i + d/2), and what does not rotate, any two of it, the pairs behind. A rotary embedding
// multiplies only what it rotates by its attention_factor, and the program everything: the other rows are
// divided by it.
void to_halves(const GqaGeometry& geometry, float attention_factor, Linear& linear);

}  // namespace relatent
