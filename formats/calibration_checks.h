// Inside formats/: whether the numbers of a calibration can come from any tokens at all.
#pragma once

#include <string>

#include "formats/calibration_store.h"

namespace relatent {

// What is wrong with numbers that are to be moments and shares, as a clause; empty when nothing is. Whoever
// changes a file may put a checksum beside what they like.
std::string why_no_moments(const LayerMoments& moments);

}  // namespace relatent
