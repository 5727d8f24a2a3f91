// MLPs with a gate, alone or as the experts of a mixture.
#pragma once

#include <functional>

#include "convert/model/attention.h"
#include "convert/model/config.h"
#include "linalg/matrix.h"

namespace relatent {

struct Mlp {
  Linear gate;                               // [intermediate, hidden]
  Linear up;                                 // [intermediate, hidden]
  Linear down;                               // [hidden, intermediate]
  Activation activation = Activation::silu;  // of the gate
};

// The experts of one layer that tokens are sent to.
struct Experts {
  ExpertsGeometry geometry;
  MatrixF router;   // [count, hidden]
  RowVectorF bias;  // [count], on scores when experts are chosen (noaux_tc), else empty
  // [hidden], by the sigmoid of whose product with a token the shared MLP is multiplied; empty: it is not.
  RowVectorF shared_gate;
  // The weights of one expert, read and widened (or packed) at every call, so that only those in use are in
  // memory. Callable from several threads.
  std::function<Mlp(Index)> expert;
};

}  // namespace relatent
