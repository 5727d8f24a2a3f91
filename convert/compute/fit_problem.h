// Linear least-squares problems over tokens, as conjugate gradients ask about them.
#pragma once

#include <functional>
#include <vector>

#include "convert/compute/absorbed_attention.h"
#include "convert/compute/statistics.h"
#include "linalg/matrix.h"

namespace relatent {

// One matrix of unknowns for each of several independent problems.
using Systems = std::vector<MatrixD>;

// Several least-squares problems side by side, each the mean over tokens of a squared error that is linear in
// the unknowns: E|b - A x|², and a ridge on the change of x.
class FitProblem {
 public:
  struct Start {
    Systems residual;           // AᵀE[b - A x] in each problem
    std::vector<double> error;  // E|b - A x|² of each, where the problem tells
  };

  FitProblem() = default;
  FitProblem(const FitProblem&) = delete;
  FitProblem& operator=(const FitProblem&) = delete;
  virtual ~FitProblem() = default;

  // Where x falls short. Once, before what follows.
  virtual Start start(const Systems& x) = 0;
  // (AᵀA + ridge) times a direction.
  virtual Systems apply(const Systems& direction) const = 0;
  // An approximate inverse of that.
  virtual Systems precondition(const Systems& residual) const = 0;
};

// The layer's output as a function of all queries and the key map together, linearised where they stand: what
// a Gauss-Newton step asks about. Unknowns: each head's query, then the key map; their error is one.
class OutputProblem : public FitProblem {
 public:
  // Mean over the sampled tokens of |target - output|².
  virtual double error() const = 0;
  // Sums for o_proj over the sampled tokens; affine: its bias may change.
  virtual RefitSums sums(bool affine) const = 0;
};

// Numbers that key maps and queries read.
struct FitInputs {
  Index key;
  Index query;
};

// Some heads, one after the other.
struct Heads {
  Index first;
  Index count;
};

// The queries of one layer, each head's a problem of its own (attention_fit.h). Keeps what depends on the
// sample alone, so it serves every call on one.
class QueryProblems {
 public:
  QueryProblems() = default;
  QueryProblems(const QueryProblems&) = delete;
  QueryProblems& operator=(const QueryProblems&) = delete;
  virtual ~QueryProblems() = default;

  // Calls body with as many heads at a time as memory allows, until it has been called with all. The
  // problem's unknowns are these heads' queries, which body may change.
  virtual void for_heads(const AbsorbedAttention& attention,
                         const std::function<void(Heads, FitProblem&)>& body) const = 0;
};

}  // namespace relatent
