// TPLA as published (Tang et al. 2025, arXiv 2508.15881), kept for comparison: one latent, turned by an
// orthogonal map and sliced, every slice normalised and scored by itself.
#pragma once

#include <string_view>

#include "convert/latent/maps.h"
#include "convert/model/attention.h"

namespace relatent {

// shared is not sliced at all: see latent/lay_out.h.
enum class LatentOrder { shared, pca, hadamard };
std::string_view order_name(LatentOrder order);

// Slices the only branch of a layer into `parts`. With Q the eigenvectors of E[c cᵀ], dealt out in turn
// (pca), or a Hadamard matrix, cut into runs (hadamard):
//   c_b = norm(Q_bᵀ W x),  scores β_b q^N · U^K Q_b c_b + q^R · k^R,  out = Σ_b softmax_b U^V Q_b c_b
// A source without a norm stays without one. One with a norm has it replaced by one for each slice, whose
// gain g_b = √(E|c_b|² r / (E|c|² r_b)) makes good for the energy that the slice has on average. β_b, folded
// into U^K, is what brings the slice's scores nearest to the whole's: Σ_h E[s_h s_hb] / Σ_h E[s_hb²].
// input_moment = E[x̃ x̃ᵀ] of x̃ = [x; 1], query_moments the same of what the queries act on.
// rank need not be a power of two: the Hadamard matrix is then one of the largest power of two that divides
// it, times a cosine basis. parts ≤ rank.
LatentAttention slice_latent(const LatentAttention& whole, Index parts, LatentOrder order,
                             MomentRef input_moment, const QueryMoments& query_moments);

// An orthogonal matrix whose entries all have about the same size, [size, size].
MatrixD hadamard_rotation(Index size);

}  // namespace relatent
