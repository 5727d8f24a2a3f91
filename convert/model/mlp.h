// SwiGLU MLPs, alone or as the experts of a mixture.
#pragma once

#include <functional>
#include <vector>

#include "convert/model/attention.h"
#include "convert/model/config.h"
#include "linalg/matrix.h"

namespace relatent {

struct Mlp {
  Linear gate;  // [intermediate, hidden]
  Linear up;    // [intermediate, hidden]
  Linear down;  // [hidden, intermediate]

  // silu(gate x) * up x, what `down` reads: x [rows, hidden] -> [rows, intermediate]
  MatrixF inner(const MatrixF& x) const;
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

// An expert of one token and what its output is multiplied by.
struct Choice {
  Index expert = 0;
  float weight = 0;
};

// The experts of every row of x [rows, hidden], per_token each, in the order of their indices; of equal
// scores the first counts as larger.
std::vector<std::vector<Choice>> choose_experts(const Experts& experts, const MatrixF& x);

// What the chosen experts add to every row, without the shared ones: x [rows, hidden] -> [rows, hidden].
MatrixF mix_experts(const Experts& experts, const MatrixF& x);

}  // namespace relatent
