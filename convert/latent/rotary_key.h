// Concentrating the rotary part: which complex combinations of the keys keep their rotation, and what a query
// should expect of the rotation that the others lose.
#pragma once

#include <optional>
#include <vector>

#include "convert/latent/maps.h"

namespace relatent {

// What becomes of a rotation that is dropped: a constant g stands in for exp(-i θ_f Δ).
struct DroppedRotation {
  MatrixC stand_in;  // g[h, f], [H, d/2]
  MatrixD loss;      // E_Δ|exp(-i θ_f Δ) - g|², [H, d/2]
};

// The best constant, g = γ[h, f] = E_Δ[exp(-i θ_f Δ)] under the head's own distribution of attention over
// distance; its loss is 1 - |γ|².
DroppedRotation expected_rotation(const LayerMaps& maps, const Moments& moments);

// g = 1, what simply not rotating amounts to; its loss is 2 - 2 Re γ.
DroppedRotation unit_rotation(const LayerMaps& maps, const Moments& moments);

// By how much a constant in a group's keys varies once it is rotated, 1 - |γ|² averaged over the group's
// heads by the energy of their queries: [K, d/2]. Near 0 for slow frequencies, where the softmax forgets it.
MatrixD constant_spread(const LayerMaps& maps, const Moments& moments);

// Per frequency f, the combinations z = e^H D k_f of the K group keys by how much score variance is lost when
// their rotation is dropped: eigenpairs of D C_f D with C_f = E[k_f k_f^H] (Hermitian: a complex combination
// commutes with the rotation, and unlike a real one it can align the phases of different groups) and D² =
// diag_g Σ_{h in g} κ_h E|q_hf|² loss_hf, with κ of HeadEffects (maps.h) in units of the layer's mean, 1
// where it is not known.
struct Concentration {
  std::vector<VectorD> loss;  // per frequency [K], largest first: scale² times the eigenvalues
  std::vector<MatrixC> read;  // per frequency [K, K]: row c gives z_c from the K keys
  std::vector<MatrixC>
      write;  // per frequency [K, K]: column c gives the K keys from z_c; write * read = identity
};
Concentration concentrate(const LayerMaps& maps, const Moments& moments, const DroppedRotation& dropped);

// Components kept per frequency, rope_dim / 2 in all: those with the largest loss summed over layers, and of
// equal ones those of the first frequencies. What does not rotate has no loss and comes behind: none of it is
// kept while there is a component that rotates.
std::vector<Index> allocate_components(const std::vector<Concentration>& layers, Index rope_dim);

// The same for engines that only know the plain list base'^(-2i/rope_dim): one component of every stride-th
// frequency, counted from the fastest, with the stride that keeps the largest loss. Every stride has its
// base: base' = base^(stride * rope_dim / d). A given stride is taken as it is. frequencies: those that
// rotate, which come before the others.
struct PlainList {
  Index stride = 1;
  std::vector<Index> components;  // as above
};
PlainList allocate_plain(const std::vector<Concentration>& layers, Index rope_dim, Index frequencies,
                         std::optional<Index> given = std::nullopt);

// How many frequencies from the fastest a plain list had better hold: up to the last one whose first
// combination keeps more than the second ones do (their median), which is what a larger list of another kind
// would hold instead. Models use a few slow frequencies much and those behind them hardly, so that one
// frequency more or less can be worth more than many coordinates of the latent.
Index worthwhile_frequencies(const std::vector<Concentration>& layers, Index frequencies);

// The frequencies of components[f] combinations of every frequency f.
Rotary kept_rotary(const Rotary& source, const std::vector<Index>& components);

// The rotary key that keeps the components[f] leading combinations of every frequency f (each at most K).
RotaryKey rotary_key(const LayerMaps& maps, const Concentration& concentration,
                     const DroppedRotation& dropped, const std::vector<Index>& components);

}  // namespace relatent
