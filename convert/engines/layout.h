// What the layouts share.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "convert/engines/engine.h"

namespace relatent {

// Halves (j, j + p/2) of rows first ... first + p to interleaved pairs (2j, 2j + 1).
void to_pairs(MatrixF& m, Index first, Index p);

RowVectorF bias_or_zero(const Linear& linear);

// The latent norms of transformers take no eps argument: 1e-6 whatever the config says.
inline constexpr double latent_norm_eps = 1e-6;

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

// Writes query, latent and norm of a layer with one normalised latent as DeepSeek's engines read it: the
// query rescaled, the latent's rows with the rotary key's behind them, rotary rows in pairs. std::logic_error
// when the layer has a bias or no norm, which those engines have no place for.
void put_query_and_latent(const LatentAttention& attention, const LayerWriter& out);

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

// Whether vLLM takes a latent and rotary key of these sizes, with which command: one line.
std::string vllm_line(const CacheShape& shape, const std::string& command);

// config.json of a dense deepseek_v3 model; what differs between engines is left out: attention_bias,
// kv_lora_rank, q_lora_rank, rope_parameters, tie_word_embeddings.
nlohmann::ordered_json deepseek_config(const nlohmann::ordered_json& source_config, const ModelConfig& source,
                                       const LatentShape& shape, DType dtype);

}  // namespace relatent
