#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "convert/engines/engine.h"
#include "convert/model/families/family.h"

namespace relatent {
namespace {

ModelConfig latent_model(const std::string& family, Index rank, Index rotary, bool bias) {
  ModelConfig out;
  out.family = find_family(family);
  out.latent.emplace();
  out.latent->kv_lora_rank = rank;
  out.latent->qk_rope_head_dim = rotary;
  out.latent->attention_bias = bias;
  out.latent->branches = {{0, 4, rank}};
  return out;
}

bool says(const ModelConfig& config, const std::string& part) {
  const std::vector<std::string> lines = readers_of(config);
  return std::any_of(lines.begin(), lines.end(),
                     [&](const std::string& line) { return line.find(part) != std::string::npos; });
}

TEST(Readers, OfAShapeThatKernelsHave) {
  EXPECT_TRUE(
      says(latent_model("deepseek_v3", 512, 64, true), "vllm serve FOLDER --model-impl transformers"));
  EXPECT_FALSE(says(latent_model("deepseek_v3", 512, 64, true), "GPUs only"));
  EXPECT_TRUE(says(latent_model("deepseek_v3", 256, 64, true), "GPUs only"));
  EXPECT_TRUE(says(latent_model("deepseek_v3", 512, 64, false), "vLLM, stock: vllm serve FOLDER"));
  EXPECT_FALSE(says(latent_model("deepseek_v3", 512, 64, false), "--model-impl"));
  EXPECT_TRUE(says(latent_model("deepseek_v3", 512, 64, false), "--engine gguf"));
  EXPECT_TRUE(says(latent_model("deepseek2", 208, 48, false), "read by llama.cpp"));
  EXPECT_FALSE(says(latent_model("deepseek_v3", 512, 64, true), "llama.cpp"));
}

TEST(Readers, OfOtherSizesAndLayouts) {
  EXPECT_TRUE(says(latent_model("deepseek_v3", 208, 64, true), "no kernel for 208 + 64"));
  EXPECT_TRUE(says(latent_model("relatent", 208, 48, true), "relatent-vllm"));
  EXPECT_FALSE(says(latent_model("relatent", 208, 48, true), "no kernel"));
  ModelConfig source;
  source.family = find_family("llama");
  source.gqa.emplace();
  EXPECT_TRUE(readers_of(source).empty());
}

}  // namespace
}  // namespace relatent
