// The Python files that go beside weights of model_type `relatent`, as text. They live in engines/hf and are
// compiled in.
#pragma once

#include <vector>

#include "convert/engines/engine.h"

namespace relatent {

// modeling_relatent.py and what it imports.
std::vector<ExtraFile> hf_files();

}  // namespace relatent
