// Configs of the MLRA and GLA authors' models.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "convert/model/config.h"
#include "convert/model/families/family.h"
#include "tests/support/author_layouts.h"
#include "tests/support/expect_error.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;
using testing_support::expect_error;

ModelConfig parse(const Json& config) {
  return parse_config(config, "folder/config.json");
}

// What the scores are multiplied by beyond (n + p)^-1/2.
float score_factor(const ModelConfig& config) {
  const LatentGeometry& latent = *config.latent;
  return config.attention.front().scale *
         std::sqrt(static_cast<float>(latent.qk_nope_head_dim + latent.qk_rope_head_dim));
}

TEST(AuthorsConfig, ReadsTheMlraAuthorsModels) {
  struct Case {
    const char* model;
    Index latents;
    Index groups;
    double branch_scale;
  };
  Json config = testing_support::tiny_mlra_model().config;
  for (const Case& test : {Case{"mlra_2", 4, 2, std::sqrt(0.5)}, Case{"mlra_4", 4, 1, 0.5},
                           Case{"gla_2", 2, 2, 1}, Case{"gla_4", 4, 4, 1}}) {
    SCOPED_TRACE(test.model);
    config["mlra_model"] = test.model;
    const ModelConfig found = parse(config);
    EXPECT_EQ(found.model_type, "gpt2");
    EXPECT_EQ(found.family->name, "mlra");
    EXPECT_EQ(found.hidden_size, 24);
    EXPECT_EQ(found.num_hidden_layers, 2);
    EXPECT_EQ(found.num_attention_heads, 8);
    EXPECT_EQ(found.intermediate_size, 40);
    EXPECT_EQ(found.vocab_size, 50);
    EXPECT_EQ(found.max_position_embeddings, 128);
    EXPECT_EQ(found.rms_norm_eps, 1e-6);
    EXPECT_TRUE(found.tie_word_embeddings);
    ASSERT_TRUE(found.latent.has_value());
    EXPECT_FALSE(found.gqa.has_value());
    const LatentGeometry& latent = *found.latent;
    EXPECT_EQ(latent.form, std::string(test.model).substr(0, std::string(test.model).size() - 2));
    EXPECT_EQ(latent.kv_lora_rank, 40);
    EXPECT_EQ(latent.q_lora_rank, 17);
    EXPECT_EQ(latent.qk_nope_head_dim, 5);
    EXPECT_EQ(latent.qk_rope_head_dim, 6);
    EXPECT_EQ(latent.v_head_dim, 5);
    EXPECT_FALSE(latent.attention_bias);
    EXPECT_FALSE(latent.rope_interleave);
    EXPECT_TRUE(latent.shared_ranks.empty());
    EXPECT_EQ(latent.norm, LatentNorm::branch);
    EXPECT_EQ(latent.norm_eps, 1e-6);
    EXPECT_FLOAT_EQ(score_factor(found), 1);
    EXPECT_NEAR(latent.query_scale, std::sqrt(24.0 / 17), 1e-12);
    EXPECT_NEAR(latent.latent_scale, std::sqrt(24.0 * static_cast<double>(test.latents) / 40), 1e-12);
    EXPECT_NEAR(latent.branch_scale, test.branch_scale, 1e-12);
    ASSERT_EQ(latent.branches.size(), static_cast<std::size_t>(test.latents));
    for (Index b = 0; b < test.latents; ++b) {
      const BranchGeometry& branch = latent.branches[static_cast<std::size_t>(b)];
      EXPECT_EQ(branch.first_head, b % test.groups * (8 / test.groups));
      EXPECT_EQ(branch.head_count, 8 / test.groups);
      EXPECT_EQ(branch.rank, 40 / test.latents);
      EXPECT_FALSE(branch.shared);
    }
    ASSERT_EQ(found.rotary.inv_freq.size(), 3U);
    EXPECT_NEAR(static_cast<double>(found.rotary.inv_freq[1]), std::pow(10000.0, -1.0 / 3), 1e-7);
    // Two layers of float32.
    EXPECT_EQ(found.cache_bytes_per_token(), (40 + 6) * 8);
    EXPECT_EQ(found.cache_bytes_per_token_on_device(2), (20 + 6) * 8);
    EXPECT_EQ(found.cache_bytes_per_token_on_device(4), (40 / test.latents + 6) * 8);
  }
  // What the authors leave out, and what they have no use for.
  config.erase("block_size");
  config["tie_word_embeddings"] = false;
  config["rope_theta"] = 5;
  const ModelConfig found = parse(config);
  EXPECT_EQ(found.max_position_embeddings, 1024);
  EXPECT_TRUE(found.tie_word_embeddings);
  EXPECT_NEAR(static_cast<double>(found.rotary.inv_freq[1]), std::pow(10000.0, -1.0 / 3), 1e-7);
}

TEST(AuthorsConfig, ReadsTheGlaAuthorsModule) {
  Json config = testing_support::tiny_gla_model().config;
  ModelConfig found = parse(config);
  EXPECT_EQ(found.model_type, "llama");
  EXPECT_EQ(found.family->name, "gla");
  EXPECT_EQ(found.hidden_size, 24);
  EXPECT_EQ(found.rms_norm_eps, 1e-5);
  EXPECT_FALSE(found.tie_word_embeddings);
  ASSERT_TRUE(found.latent.has_value());
  EXPECT_FALSE(found.gqa.has_value());
  EXPECT_EQ(found.latent->form, "gla");
  EXPECT_EQ(found.latent->kv_lora_rank, 32);
  EXPECT_EQ(found.latent->q_lora_rank, 64);
  EXPECT_EQ(found.latent->qk_nope_head_dim, 8);
  EXPECT_EQ(found.latent->v_head_dim, 8);
  EXPECT_EQ(found.latent->qk_rope_head_dim, 6);
  EXPECT_TRUE(found.latent->attention_bias);
  EXPECT_FALSE(found.latent->rope_interleave);
  EXPECT_EQ(found.latent->norm_eps, 1e-5);
  EXPECT_EQ(found.latent->latent_scale, 1);
  EXPECT_EQ(found.latent->branch_scale, 1);
  EXPECT_EQ(found.latent->query_scale, 1);
  ASSERT_EQ(found.latent->branches.size(), 2U);
  EXPECT_EQ(found.latent->branches[0].first_head, 0);
  EXPECT_EQ(found.latent->branches[1].first_head, 3);
  for (const BranchGeometry& branch : found.latent->branches) {
    EXPECT_EQ(branch.head_count, 3);
    EXPECT_EQ(branch.rank, 16);
  }
  EXPECT_NEAR(static_cast<double>(found.rotary.inv_freq[1]), std::pow(500.0, -1.0 / 3), 1e-7);
  EXPECT_EQ(found.cache_bytes_per_token(), (32 + 6) * 8);
  EXPECT_EQ(found.cache_bytes_per_token_on_device(2), (16 + 6) * 8);
  // What a LlamaConfig leaves out.
  config.erase("head_dim");
  config.erase("attention_bias");
  found = parse(config);
  EXPECT_EQ(found.latent->qk_nope_head_dim, 4);
  EXPECT_EQ(found.latent->kv_lora_rank, 16);
  EXPECT_FALSE(found.latent->attention_bias);
  // Without its key it is a Llama.
  config["qk_rope_dim"] = nullptr;
  EXPECT_EQ(parse(config).model_type, "llama");
}

TEST(AuthorsConfig, RefusalsOfTheAuthorsModels) {
  struct Case {
    std::string changes;
    std::vector<std::string> parts;
    bool gla = false;
  };
  const std::string positive = "a positive whole number";
  const std::vector<Case> cases = {
      {R"({"n_embd": 0})", {"n_embd", positive, "0"}},
      {R"({"n_layer": null})", {"n_layer", positive}},
      {R"({"n_head": "8"})", {"n_head", positive}},
      {R"({"vocab_size": -1})", {"vocab_size", positive}},
      {R"({"intermediate_size": null})", {"intermediate_size", positive}},
      {R"({"block_size": "long"})", {"block_size", positive}},
      {R"({"mlra_model": "mlra_3"})", {"mlra_model", "mlra_2, mlra_4, gla_2 or gla_4", "mlra_3"}},
      {R"({"mlra_model": "mla_2"})", {"mlra_model", "mlra_2, mlra_4, gla_2 or gla_4", "mla_2"}},
      {R"({"mlra_model": ""})", {"mlra_model", "gla_4"}},
      {R"({"mlra_model": 2})", {"mlra_model", "a string", "2"}},
      {R"({"kv_lora_rank": null})", {"kv_lora_rank", positive}},
      {R"({"kv_lora_rank": 42})", {"kv_lora_rank", "a multiple of 4", "42"}},
      {R"({"kv_lora_rank": 41, "mlra_model": "gla_2"})", {"kv_lora_rank", "a multiple of 2", "41"}},
      {R"({"n_head": 7})", {"n_head", "a multiple of 2", "7"}},
      {R"({"n_head": 7, "mlra_model": "gla_2"})", {"n_head", "a multiple of 2", "7"}},
      {R"({"n_head": 6, "mlra_model": "gla_4"})", {"n_head", "a multiple of 4", "6"}},
      {R"({"qk_nope_head_dim": 0})", {"qk_nope_head_dim", positive}},
      {R"({"qk_rope_head_dim": 0})", {"qk_rope_head_dim", positive}},
      {R"({"qk_rope_head_dim": 5})", {"rotary size", "even", "5"}},
      {R"({"q_lora_rank": null})", {"q_lora_rank", positive}},
      {R"({"dtype": "int8"})", {"dtype", "bfloat16, float16 or float32", "int8"}},
      {R"({"quantization_config": {}})", {"quantization_config", "unquantised"}},
      {R"({"qk_rope_dim": 0})", {"qk_rope_dim", positive, "0"}, true},
      {R"({"qk_rope_dim": "8"})", {"qk_rope_dim", positive}, true},
      {R"({"qk_rope_dim": 5})", {"rotary size", "even", "5"}, true},
      {R"({"num_attention_heads": 5})", {"num_attention_heads", "an even number", "5"}, true},
      {R"({"head_dim": 0})", {"head_dim", positive}, true},
      {R"({"head_dim": null, "hidden_size": 25})", {"head_dim", "not a multiple"}, true},
      {R"({"head_dim": null, "hidden_size": 4})", {"head_dim", "not a multiple"}, true},
      {R"({"partial_rotary_factor": 0.5})", {"partial_rotary_factor", "0.5"}, true},
      {R"({"partial_rotary_factor": "half"})", {"partial_rotary_factor"}, true},
      {R"({"attention_bias": "yes"})", {"attention_bias", "true or false", "yes"}, true},
      {R"({"rms_norm_eps": null})", {"rms_norm_eps", "a number"}, true},
      {R"({"hidden_act": "gelu"})", {"hidden_act", "silu", "gelu"}, true},
      {R"({"rope_theta": 0})", {"rope_theta", "a positive number"}, true},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.changes);
    Json config =
        test.gla ? testing_support::tiny_gla_model().config : testing_support::tiny_mlra_model().config;
    EXPECT_NO_THROW(parse(config));
    const Json changes = Json::parse(test.changes);
    for (const auto& [key, value] : changes.items()) {
      config[key] = value;
    }
    std::vector<std::string> parts = test.parts;
    parts.emplace_back("folder/config.json");
    expect_error(ErrorKind::input, parts, [&] { parse(config); });
  }
  // Any number of heads reads all four latents.
  Json config = testing_support::tiny_mlra_model().config;
  config["mlra_model"] = "mlra_4";
  config["n_head"] = 7;
  EXPECT_NO_THROW(parse(config));
}

}  // namespace
}  // namespace relatent
