// A single GGUF file for llama.cpp, architecture deepseek2: what the deepseek engine writes as llama.cpp
// reads it, q_lora_rank 0 for an uncompressed query, the latent as wide as it is, its norm with the layers'
// own eps, kv_b_proj as two tensors, vectors in float32, the tokenizer inside. An output head that is the
// embedding is left out.
#pragma once

#include <memory>

#include "convert/engines/engine.h"

namespace relatent {

std::unique_ptr<Engine> make_gguf_engine();

}  // namespace relatent
