// The source's and the converted model's residual streams side by side, one layer at a time, with closed-form
// refits on the way: every layer is fitted to the stream that the converted layers before it really produce.
#pragma once

#include <cstdint>

#include "convert/latent/maps.h"
#include "convert/model/forward.h"
#include "convert/model/model.h"

namespace relatent {

struct RefitOptions {
  bool output = true;  // o_proj, after the attention is converted
  bool mlp = true;     // down_proj, after that
  bool realign =
      true;  // q, k and v read the converted stream through the linear map that best restores the source's
  double ridge = 1e-4;  // of the refits, against the mean squared feature
  double realign_ridge = 1e-2;
};

// What two streams know of a layer's input.
struct InputMoments {
  MatrixD converted;       // E[x_c x_cᵀ], [D, D]
  VectorD converted_mean;  // E[x_c]
  MatrixD cross;           // E[x_s x_cᵀ]
};

class TwinStreams {
 public:
  TwinStreams(const Model& source, const Sequences& sequences);

  InputMoments input_moments(const RmsNorm& input_norm) const;
  // Runs the attention of `source` on its stream and `converted` on the other; refits converted.o when asked,
  // and moves both streams past the attention.
  void attention(const Layer& source, LatentAttention& converted, const RefitOptions& options);
  // Runs the MLPs, refits the converted one's down projection when asked, and moves both streams past the
  // layer.
  void mlp(const Layer& source, Linear& down, const RefitOptions& options);

  const Stream& source() const { return source_; }
  const Stream& converted() const { return converted_; }

 private:
  Stream source_;
  Stream converted_;
};

}  // namespace relatent
