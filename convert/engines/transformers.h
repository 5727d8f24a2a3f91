// Stock Hugging Face transformers, model_type deepseek_v3, without any custom code and without loss.
//
// transformers normalises both latents, which a converted model does not want. Every latent therefore gets
// one more coordinate that reads nothing and has a large constant bias β: then rms(c) = β/√r (1 + |c|²/2β² +
// ...) is constant to any precision wanted and the norm's gain undoes it. The constant coordinate of the
// query latent also carries the query bias, for which q_b_proj has no place. Any list of rotary frequencies
// is written through rope type `longrope`.
#pragma once

#include <memory>

#include "convert/engines/engine.h"

namespace relatent {

std::unique_ptr<Engine> make_transformers_engine();

}  // namespace relatent
