// What latents are divided by, and the moments that such divisors are fitted to.
#pragma once

#include <optional>

#include "convert/compute/absorbed_attention.h"
#include "convert/compute/statistics.h"
#include "linalg/matrix.h"

namespace relatent {

// 1/ρ for every row of inputs x̃ [tokens, D + 1].
VectorF inverse_norm(const NormCompletion& norm, const MatrixD& latent, const MatrixF& inputs);
// The same of whatever the latent is divided by. Empty where the latent is not divided.
VectorF latent_shrink(const AbsorbedAttention& attention, const MatrixF& inputs);

// As the backend's operations of these names.
MeanMoments mean_moments(const MatrixF& inputs, Index first, Index count);
SquareMoments square_moments(const MatrixF& map, const std::optional<CoordinateByHalf>& by_half,
                             const VectorD& least, const MatrixF& inputs);

}  // namespace relatent
