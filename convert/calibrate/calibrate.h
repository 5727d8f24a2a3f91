// One pass over calibration tokens, which serves every rank, target and method afterwards.
#pragma once

#include <filesystem>
#include <functional>

#include "convert/model/layer_progress.h"
#include "convert/model/model.h"
#include "formats/calibration_store.h"
#include "formats/npy.h"
#include "formats/resume.h"

namespace relatent {

// Runs the source over the sequences layer by layer and writes, per layer, E[x xᵀ] and E[x] of the normed
// attention input, and per query head the distribution of attention mass over distance (mean over queries, so
// that early queries, which see few keys, count like late ones). Numbers are the same for any thread count.
// compute: f32, or bf16 for projections multiplied in bfloat16 and summed in float32, where
// Backend::has_bf16. A file of that name is replaced. Throws Error as the stores and WorkFolder do; on an
// error nothing is left, except for what --resume can go on from when the machine is to blame.
void calibrate(const Model& model, const Sequences& sequences, const std::filesystem::path& output,
               const LayerProgress& progress, const SaveOptions& save = {}, DType compute = DType::f32);

}  // namespace relatent
