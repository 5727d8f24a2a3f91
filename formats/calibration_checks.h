// Whether numbers that were read can be what a calibration holds.
#pragma once

#include <string>

#include "formats/calibration_store.h"

namespace relatent {

// What is wrong with numbers that are to be moments and shares, as a clause; empty when nothing is. Whoever
// changes a file may put a checksum beside what they like.
std::string why_no_moments(const LayerMoments& moments);

}  // namespace relatent
