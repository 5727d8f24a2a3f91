// The layout of the GLA authors' module (Dao-AILab/grouped-latent-attention, modeling_llama_GLA.py): two
// latents of 2 d coordinates, a query latent of 8 d, d the head size, both normalised; biases on all of them;
// a plain list of rotary frequencies.
#pragma once

#include <memory>

#include "convert/engines/engine.h"

namespace relatent {

std::unique_ptr<Engine> make_gla_engine();

}  // namespace relatent
