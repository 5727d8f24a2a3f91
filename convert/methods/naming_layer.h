// Numerical failures say which layer they belong to.
#pragma once

#include <string>
#include <utility>

#include "linalg/decompose.h"
#include "linalg/matrix.h"

namespace relatent {

// Runs body(); a NumericalError leaves with the layer's number in front and what to try behind it.
template <typename Body>
auto naming_layer(Index layer_idx, Body&& body, const std::string& remedy = "") {
  try {
    return std::forward<Body>(body)();
  } catch (const NumericalError& error) {
    throw NumericalError("layer " + std::to_string(layer_idx) + ": " + error.what() +
                         (remedy.empty() ? "" : "; " + remedy));
  }
}

}  // namespace relatent
