#include "convert/engines/readers.h"

#include <algorithm>

#include "convert/engines/engine.h"

namespace relatent {

std::vector<std::string> readers_of(const ModelConfig& config) {
  if (!config.latent) {
    return {};
  }
  const LatentGeometry& latent = *config.latent;
  if (config.model_type == "relatent") {
    return {"read by vLLM with the relatent-vllm plug-in: vllm serve FOLDER",
            "read by transformers with the code beside the weights: trust_remote_code=True"};
  }
  if (config.model_type != "deepseek_v3" || latent.branches.size() != 1) {
    return {};
  }
  const CacheShape shape{latent.kv_lora_rank, latent.qk_rope_head_dim};
  const std::string size = std::to_string(shape.latent) + " + " + std::to_string(shape.rotary);
  const bool served = std::find(served_shapes.begin(), served_shapes.end(), shape) != served_shapes.end();
  const std::string on = shape == served_shapes.front() ? "" : " (GPUs only: its CPU backend takes 512 + 64)";
  const std::string no_kernel =
      "not read by vLLM: no kernel for " + size + " numbers, convert with --shape 512+64 or 256+64";
  // Biases and free frequencies need transformers' own classes.
  if (latent.attention_bias || config.rotary.rope_type == "longrope") {
    return {"read by transformers, stock: deepseek_v3",
            served ? "read by vLLM, stock: vllm serve FOLDER --model-impl transformers" + on : no_kernel};
  }
  return {"read by transformers, stock: deepseek_v3",
          served ? "read by vLLM, stock: vllm serve FOLDER" + on : no_kernel,
          "read by llama.cpp, after its converter, which wants \"q_lora_rank\": 0 in config.json where there "
          "is null"};
}

}  // namespace relatent
