// DeepSeek-V2/V3 as vLLM, SGLang and DeepSeek's own code serve it: a normalised latent, no bias anywhere, the
// plain list of rotary frequencies, an output head of its own. Stock transformers loads it too.
#pragma once

#include <memory>

#include "convert/engines/engine.h"

namespace relatent {

std::unique_ptr<Engine> make_deepseek_engine();

// The base whose plain list base^(-2i/p) is the rotary's. Throws std::invalid_argument when the list is not
// geometric or does not start at 1.
double geometric_base(const Rotary& rotary);

}  // namespace relatent
