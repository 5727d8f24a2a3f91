// The layout of the MLRA authors' code (SongtaoLiu0823/MLRA, model/{mlra_2,mlra_4,gla_2,gla_4}.py): MLRA and
// GLA without biases, a norm on every latent, a query that always passes a normalised latent, the plain list
// of rotary frequencies of base 10000, and an output head that is the embedding.
#pragma once

#include <memory>

#include "convert/engines/engine.h"

namespace relatent {

// For form mlra or gla; of two or four branches.
std::unique_ptr<Engine> make_mlra_engine();

}  // namespace relatent
