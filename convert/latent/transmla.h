// The published conversion, TransMLA (Meng et al., 2025, arXiv 2502.07864), kept as published for comparison.
#pragma once

#include "convert/latent/maps.h"

namespace relatent {

struct TransmlaOptions {
  Index rope_dim = 0;  // divides head_dim; the list keeps every (head_dim / rope_dim)-th frequency
  Index fold = 1;      // neighbouring frequencies that share one PCA; a multiple of head_dim / rope_dim that
                       // divides head_dim / 2
  // Keys are divided by (mean key norm) / (balance * mean value norm); 0 turns balancing off.
  double balance = 1;
};

// Throws Error (usage) naming the option when the sizes do not fit together.
void check_transmla(const TransmlaOptions& options, Index head_dim);

// The frequencies that are kept: every (head_dim / rope_dim)-th.
Rotary transmla_rotary(const Rotary& source, const TransmlaOptions& options, Index head_dim);

// RoRoPE with FreqFold: per fold of frequencies, the real eigenvectors of the key moment (real and imaginary
// parts added) over all groups; the leading fold / collapse of them become rotary coordinates, collapse =
// head_dim / rope_dim.
struct TransmlaKey {
  RotaryKey key;
  MatrixD leftover;  // [K d - rope_dim, K d], orthonormal rows: the coordinates of the PCA that lose their
                     // rotation
};
TransmlaKey transmla_rotary_key(const LayerMaps& maps, const Moments& moments,
                                const TransmlaOptions& options);

// Balanced key-value PCA: leading eigenvectors of E[y yᵀ], y = [leftover k / ratio; v], where ratio brings
// the mean root mean square of the leftover's coordinates to `balance` times that of the values, but for the
// first rope_dim of them, which the authors' code leaves out. rank ≤ 2 K d - rope_dim.
JointLatent transmla_latent(const LayerMaps& maps, const Moments& moments, const TransmlaKey& key,
                            const TransmlaOptions& options, Index rank);

// PCA of the stacked queries. q_rank ≤ H d.
LowRankQuery transmla_query(const LayerMaps& maps, const Moments& moments, Index q_rank);

}  // namespace relatent
