// One latent for leftover keys and values, weighed by what their errors do to the layer's output.
#pragma once

#include "convert/latent/maps.h"

namespace relatent {

struct JointLatentOptions {
  Index rank = 0;
  // false: A_K = A_V = 1, a PCA of balanced keys and values.
  bool output_metric = true;
  // false: S = E[y yᵀ] and nothing is shifted, for engines that have no bias to carry the mean.
  bool centred = true;
  // Shared key, split value: keys may read only the first so many coordinates, values all; -1 = keys may read
  // all.
  std::optional<Index> key_rank{};
  double value_weight = 0.1;  // of values against keys in those first coordinates
  double key_weight = 1;      // of A_K: what first order does not say of score errors
  // The heads that read it; 0 = all.
  Index first_head = 0;
  Index head_count = 0;
};

// To first order errors of a head's scores and values reach the layer's output as HeadEffects (maps.h) says,
// κ_h and β_h, so with g a group and s the scale of scores
//   A_K² = blockdiag_g Σ_{h in g} κ_h s² E[q̃_h q̃_hᵀ],  A_V² = blockdiag_g Σ_{h in g} β_h W_{O,h}ᵀ W_{O,h},
//   M = blockdiag(key_weight A_K, A_V),
// the latent is the rank leading eigenvectors P of M S M: down = Pᵀ M Y, up = M⁻¹ P. S is the covariance of
// y = [r; v]: a constant in a leftover key cancels in the softmax, and one in a value comes out of the
// attention unchanged, as value_shift. q̃ = content_query q. rank ≤ 2 K' d, K' the groups that the heads read.
// Where the effects are not known, all are 1 and
//   M = blockdiag(A_K / √tr(A_K S_rr A_K), A_V / √tr(A_V S_vv A_V)).
//
// With a key_rank, the first coordinates are the leading eigenvectors of that M S M with A_V scaled by
// value_weight, keys are what they tell of r, and the rest are the leading eigenvectors of what they leave of
// the values, A_V S_vv|c A_V.
JointLatent joint_latent(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                         const JointLatentOptions& options);

}  // namespace relatent
