// The operations of backend.h on this machine's processors: OpenBLAS and LAPACKE, oneDNN for bfloat16.
#pragma once

#include <memory>

#include "convert/compute/backend.h"

namespace relatent {

std::unique_ptr<const Backend> make_cpu_backend();

}  // namespace relatent
