// Stock Hugging Face transformers, model_type deepseek_v3, without any custom code and without loss.
//
// transformers normalises both latents, which a converted model does not want. Every latent therefore gets
// one more coordinate that reads nothing and has a large constant bias β: then rms(c) = β/√r (1 + |c|²/2β² +
// ...) is constant to any precision wanted and the norm's gain undoes it. The constant coordinate of the
// query latent also carries the query bias, for which q_b_proj has no place. Any list of rotary frequencies
// is written through rope type `longrope`.
#pragma once

#include <memory>

#include "convert/engines/engine.h"

namespace relatent {

std::unique_ptr<Engine> make_transformers_engine();

// How a latent survives RMSNorm. Coordinates are multiplied by `scale` (a power of two that brings their mean
// square near 1) and joined by a constant `beta`; the norm divides by rms, and gain * (scale c) / rms *
// correction = c.
struct NormUndo {
  double scale = 1;       // on the down-projection
  double beta = 0;        // bias of the constant coordinate, exact in the dtype
  double gain = 1;        // on the norm weight, exact in the dtype
  double correction = 1;  // on the up-projection: what rounding beta and gain left, at most 2e-3 away from 1
  double constant = 1;    // value of the constant coordinate after the norm with gain 1
};
// rank without the constant coordinate; mean_square 0 = unknown, taken as 1.
NormUndo undo_norm(Index rank, double mean_square, double eps, DType dtype);

// What goes into the query for engines that multiply scores by (n + p)^-1/2.
double query_rescale(const LatentAttention& attention);

// A query without a norm as an engine with a normalised query latent of `size` coordinates stores it, its
// rotary rows in halves. The last coordinate is the constant, which carries the query bias; size is at least
// one more than what the query acts on, and what is left between them is zero.
struct StoredQuery {
  MatrixF down;          // [size, hidden]
  RowVectorF down_bias;  // [size]
  RowVectorF gain;       // [size], of the norm
  MatrixF up;            // [heads * (n + p), size], rescaled
};
StoredQuery store_query(const LatentAttention& attention, Index size, DType dtype);

}  // namespace relatent
