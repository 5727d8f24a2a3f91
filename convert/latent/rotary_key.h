// Concentrating the rotary part: which complex combinations of the keys keep their rotation, and what a query
// should expect of the rotation that the others lose.
#pragma once

#include <vector>

#include "convert/latent/maps.h"

namespace relatent {

// γ[h, f] = E_Δ[exp(-i θ_f Δ)] under the head's own distribution of attention over distance: the constant
// that stands in for a dropped rotation with the least squared error. [H, d/2]
MatrixC expected_rotation(const LayerMaps& maps, const Moments& moments);

// Per frequency f, the combinations z = e^H D k_f of the K group keys by how much score variance is lost when
// their rotation is dropped: eigenpairs of D C_f D with C_f = E[k_f k_f^H] (Hermitian: a complex combination
// commutes with the rotation, and unlike a real one it can align the phases of different groups) and D² =
// diag_κ Σ_{h in κ} E|q_hf|² (1 - |γ_hf|²).
struct Concentration {
  std::vector<VectorD> loss;  // per frequency [K], largest first: scale² times the eigenvalues
  std::vector<MatrixC> read;  // per frequency [K, K]: row c gives z_c from the K keys
  std::vector<MatrixC>
      write;  // per frequency [K, K]: column c gives the K keys from z_c; write * read = identity
};
Concentration concentrate(const LayerMaps& maps, const Moments& moments, const MatrixC& gamma);

// Components kept per frequency, rope_dim / 2 in all: those with the largest loss summed over layers.
std::vector<Index> allocate_components(const std::vector<Concentration>& layers, Index rope_dim);

// The rotary key that keeps the components[f] leading combinations of every frequency f (each at most K).
RotaryKey rotary_key(const LayerMaps& maps, const Concentration& concentration, const MatrixC& gamma,
                     const std::vector<Index>& components);

}  // namespace relatent
