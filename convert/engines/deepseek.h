// DeepSeek-V2/V3 as vLLM, SGLang and DeepSeek's own code serve it: a normalised latent, no bias anywhere, the
// plain list of rotary frequencies, an output head of its own. Stock transformers loads it too.
#pragma once

#include <memory>

#include "convert/engines/engine.h"

namespace relatent {

std::unique_ptr<Engine> make_deepseek_engine();

}  // namespace relatent
