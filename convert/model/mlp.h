// SwiGLU MLPs, alone or as the experts of a mixture.
#pragma once

#include <functional>

#include "convert/model/attention.h"
#include "convert/model/config.h"
#include "linalg/matrix.h"

namespace relatent {

struct Mlp {
  Linear gate;  // [intermediate, hidden]
  Linear up;    // [intermediate, hidden]
  Linear down;  // [hidden, intermediate]
};

// The experts of one layer that tokens are sent to.
struct Experts {
  ExpertsGeometry geometry;
  MatrixF router;   // [count, hidden]
  RowVectorF bias;  // [count], on scores when experts are chosen (noaux_tc), else empty
  // The weights of one expert, widened at every call, so that never more than one for each thread is in
  // memory. Callable from several threads.
  std::function<Mlp(Index)> expert;
};

}  // namespace relatent
