// Partitioned latents for an engine that normalises each of them and knows no biases.
#pragma once

#include "convert/latent/norm_completion.h"
#include "convert/model/attention.h"

namespace relatent {

// Stores `latent` [r, D + 1] as an engine with an RMSNorm reads it back: `branch` gets the down-projection of
// the r + e coordinates, a norm of unit gain, and an up-projection that undoes the scales and does not read
// what was added. branch.up is [rows, r] before, [rows, r + e] after.
void store_normed(const MatrixD& latent, const NormCompletion& norm, LatentBranch& branch);

// Gives every branch a norm of its own that divides by nearly 1 (norm_completion.h, with `extra` more
// coordinates each), after which no two branches share coordinates: a scale belongs to one norm. inputs x̃
// [tokens, D + 1] end in 0, as do the latents' biases, and input_moment is their second moment.
void normalise_branches(LatentAttention& attention, const MatrixF& inputs, const MatrixD& input_moment,
                        Index extra);

}  // namespace relatent
