// Next-token logits and what differs between those of two models.
#pragma once

#include "convert/compute/statistics.h"
#include "convert/compute/stream.h"
#include "convert/model/model.h"
#include "formats/npy.h"
#include "linalg/matrix.h"

namespace relatent {

// As the backend's operations of these names.
MatrixF logits_of(const Model& model, const Stream& stream, Index sequence);
LogitComparison compare_logits(const Model& source, const Stream& source_stream, const Model& converted,
                               const Stream& converted_stream, const Sequences& sequences);

}  // namespace relatent
