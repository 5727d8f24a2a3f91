// The Python files that go beside weights of model_type `relatent`, as text. They live in engines/hf and are
// compiled in.
#pragma once

#include <string_view>

namespace relatent {

std::string_view hf_configuration();
std::string_view hf_modeling();

}  // namespace relatent
