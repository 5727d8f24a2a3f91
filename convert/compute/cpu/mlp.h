// MLPs with a gate and mixtures of them.
#pragma once

#include <vector>

#include "convert/model/model.h"

namespace relatent {

// activation(gate x) * up x, what `down` reads: x [rows, hidden] -> [rows, intermediate]
MatrixF gated(const Mlp& mlp, const MatrixF& x);

// What the MLP adds that every row passes, times the shared gate where there is one: x [rows, hidden] ->
// [rows, hidden]; without columns where there is none.
MatrixF shared_output(const MlpHalf& half, const MatrixF& x);

// An expert of one token and what its output is multiplied by.
struct Choice {
  Index expert = 0;
  float weight = 0;
};

// The experts of every row of x [rows, hidden], per_token each, in the order of their indices; of equal
// scores the first counts as larger.
std::vector<std::vector<Choice>> choose_experts(const Experts& experts, const MatrixF& x);

// What the chosen experts add to every row, without the shared ones: x [rows, hidden] -> [rows, hidden].
// Every expert that is chosen is read once.
MatrixF mix_experts(const Experts& experts, const MatrixF& x);

}  // namespace relatent
