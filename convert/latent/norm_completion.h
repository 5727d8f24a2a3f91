// Living with an engine that normalises the latent and has no bias to undo it with: non-negative least
// squares over tokens bring the ρ² of NormCompletion as near to 1 as they can.
#pragma once

#include "convert/compute/absorbed_attention.h"
#include "linalg/matrix.h"

namespace relatent {

// The added coordinates, which no latent decides, without squares.
NormCompletion added_coordinates(const MatrixF& inputs, const MatrixD& input_moment, Index count);

// Fits the squares for a latent, with the coordinates that the norm has.
void fit_norm(const MatrixD& latent, const MatrixF& inputs, const MatrixD& input_moment,
              NormCompletion& norm);

// Both. latent [r, D + 1]; inputs x̃ [tokens, D + 1], sequence after sequence, with their second moment;
// extra_count coordinates are added (directions beyond the rank of the inputs are zero and do nothing). How
// closely the sample is fitted is chosen by what either half of it says of the other, so that the norm of few
// tokens, or of the same words again and again, holds on other tokens.
NormCompletion complete_norm(const MatrixD& latent, const MatrixF& inputs, const MatrixD& input_moment,
                             Index extra_count);

}  // namespace relatent
