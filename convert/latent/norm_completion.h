// Living with an engine that normalises the latent and has no bias to undo it with.
#pragma once

#include <array>

#include "linalg/matrix.h"

namespace relatent {

// The engine divides the latent by its root mean square. Its coordinates may be scaled freely (undone in the
// up-projection), and a few may be added that nothing reads, so what it divides by is ρ = √(Σ_j s_j² y_j²)
// with y = [c; extra x̃] and any s. Non-negative least squares over tokens bring ρ² as near to 1 as they can.
struct NormCompletion {
  MatrixD extra;  // [e, D + 1] of mean square 1 at most: the linear map nearest to 1, then leading directions
  VectorD square;  // [r + e], s_j² > 0
  // The first row of extra as fitted to either half of the inputs alone, [D + 1] each; empty where nothing is
  // near to 1.
  std::array<VectorD, 2> constant_of_half{};

  bool present() const { return square.size() > 0; }
};

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

// 1/ρ for every row of inputs [tokens, D + 1].
VectorF inverse_norm(const NormCompletion& norm, const MatrixD& latent, const MatrixF& inputs);

}  // namespace relatent
