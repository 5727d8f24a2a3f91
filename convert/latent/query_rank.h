// Queries through a latent of few coordinates.
#pragma once

#include "convert/latent/maps.h"
#include "convert/model/attention.h"
#include "linalg/matrix.h"

namespace relatent {

// Replaces attention.q, which acts on x, by two maps with `rank` coordinates between them and no norm: among
// all such, those nearest in E‖W (q - q') x‖², W giving every row the weight that its key coordinate has in
// scores. Content rows are taken to meet keys of mean square 1, as to_latent_attention leaves them; rotary
// rows meet the rotary key. input_moment = E[x̃ x̃ᵀ], [D + 1, D + 1]. The bias stays. Throws
// std::invalid_argument when rank is not from 1 to D or the query is of low rank already.
void compress_query(LatentAttention& attention, MomentRef input_moment, Index rank);

}  // namespace relatent
