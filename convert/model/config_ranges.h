// How large and how small the numbers of a config may be. Every published model is far inside these ranges;
// what lies outside is a mistake, found before it becomes an overflow, NaN or an allocation of the whole
// memory.
#pragma once

#include <limits>
#include <string_view>

#include "linalg/matrix.h"

namespace relatent {

// What a size of this key may be at most.
Index largest_size(std::string_view key);

struct NumberRange {
  double least;
  double most;

  // NaN is in none.
  bool holds(double value) const { return least <= value && value <= most; }
  bool operator==(const NumberRange&) const = default;
};
inline constexpr NumberRange any_finite = {std::numeric_limits<double>::lowest(),
                                           std::numeric_limits<double>::max()};
// Of a number that is no size; any_finite where the key has no range of its own.
NumberRange number_range(std::string_view key);

}  // namespace relatent
