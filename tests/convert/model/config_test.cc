#include "convert/model/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "convert/model/families/family.h"
#include "tests/support/author_layouts.h"
#include "tests/support/expect_error.h"
#include "tests/support/parsed_config.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;
using testing_support::expect_error;
using testing_support::parse;
using testing_support::score_factor;

Json gqa_config() {
  return testing_support::tiny_config({.tied = true, .dtype = DType::bf16});
}
Json mla_config() {
  return testing_support::tiny_latent_model({.q_rank = 9}).config;
}

TEST(Config, ReadsGroupedQueryModels) {
  for (const char* type : {"llama", "mistral", "qwen2"}) {
    Json config = gqa_config();
    config["model_type"] = type;
    const ModelConfig found = parse(config);
    EXPECT_EQ(found.model_type, type);
    EXPECT_EQ(found.hidden_size, 24);
    EXPECT_EQ(found.num_hidden_layers, 3);
    EXPECT_EQ(found.num_attention_heads, 6);
    EXPECT_EQ(found.intermediate_size, 40);
    EXPECT_EQ(found.vocab_size, 50);
    EXPECT_EQ(found.max_position_embeddings, 128);
    EXPECT_EQ(found.rms_norm_eps, 1e-5);
    EXPECT_TRUE(found.tie_word_embeddings);
    // transformers' Mistral has a window where the config says nothing; it is longer than any sequence here.
    EXPECT_EQ(found.attention.front().window,
              type == std::string("mistral") ? std::optional<Index>(4096) : std::nullopt);
    EXPECT_TRUE(found.sliding_layers().empty());
    EXPECT_EQ(found.dtype, DType::bf16);
    EXPECT_EQ(found.rotary.inv_freq.size(), 4U);
    EXPECT_NEAR(static_cast<double>(found.rotary.inv_freq[1]), std::pow(100.0, -0.25), 1e-7);
    ASSERT_TRUE(found.gqa);
    EXPECT_FALSE(found.latent);
    EXPECT_EQ(found.gqa->num_key_value_heads, 2);
    EXPECT_EQ(found.gqa->head_dim, 8);
    EXPECT_EQ(found.cache_elements(), 2 * 2 * 8);
    EXPECT_EQ(found.cache_bytes_per_token(), 2 * 2 * 8 * 3 * 2);
    // Two heads on one device, one on each of two, and copies beyond.
    EXPECT_EQ(found.cache_bytes_per_token_on_device(1), 192);
    EXPECT_EQ(found.cache_bytes_per_token_on_device(2), 96);
    EXPECT_EQ(found.cache_bytes_per_token_on_device(8), 96);
  }
}

TEST(Config, UnevenHeadsRoundUpOnADevice) {
  Json config = gqa_config();
  config["num_key_value_heads"] = 3;
  EXPECT_EQ(parse(config).cache_bytes_per_token_on_device(2), 2 * 2 * 8 * 3 * 2);
}

TEST(Config, ReadsLatentModels) {
  const ModelConfig found = parse(mla_config());
  EXPECT_FALSE(found.gqa);
  ASSERT_TRUE(found.latent);
  EXPECT_EQ(found.latent->kv_lora_rank, 11);
  EXPECT_EQ(found.latent->qk_nope_head_dim, 5);
  EXPECT_EQ(found.latent->qk_rope_head_dim, 6);
  EXPECT_EQ(found.latent->v_head_dim, 7);
  EXPECT_EQ(found.latent->q_lora_rank, 9);
  EXPECT_FALSE(found.latent->attention_bias);
  EXPECT_TRUE(found.latent->rope_interleave);
  EXPECT_FLOAT_EQ(score_factor(found), 1);
  EXPECT_EQ(found.rotary.inv_freq.size(), 3U);
  EXPECT_EQ(found.cache_elements(), 17);
  EXPECT_EQ(found.cache_bytes_per_token(), 17 * 3 * 4);
  // Every device holds the one latent; more devices than heads divide by cannot share the layer.
  EXPECT_EQ(found.cache_bytes_per_token_on_device(2), 17 * 3 * 4);
  EXPECT_EQ(found.cache_bytes_per_token_on_device(4), std::nullopt);

  Json config = mla_config();
  config["q_lora_rank"] = nullptr;
  config["qk_nope_head_dim"] = 0;
  config["rope_interleave"] = false;
  config["attention_bias"] = true;
  const ModelConfig other = parse(config);
  EXPECT_EQ(other.latent->q_lora_rank, std::nullopt);
  EXPECT_EQ(other.latent->qk_nope_head_dim, 0);
  EXPECT_FALSE(other.latent->rope_interleave);
  EXPECT_TRUE(other.latent->attention_bias);
}

// DeepSeek multiplies the softmax scale by the square of 0.1 mscale_all_dim ln(factor) + 1.
// Rank 40 in four latents (two for gla_2), of which mlra_2 gives two to each half of the heads.
TEST(Config, ScaledRotationScalesTheSoftmaxOfLatentModels) {
  const Json yarn = {{"rope_type", "yarn"}, {"rope_theta", 100.0},
                     {"factor", 40.0},      {"original_max_position_embeddings", 64},
                     {"mscale", 1.0},       {"mscale_all_dim", 0.7}};
  const double mscale = 0.1 * 0.7 * std::log(40.0) + 1;
  Json config = mla_config();
  config["rope_parameters"] = yarn;
  EXPECT_FLOAT_EQ(score_factor(parse(config)), static_cast<float>(mscale * mscale));
  config = mla_config();
  config.erase("rope_parameters");
  config["rope_scaling"] = yarn;
  EXPECT_FLOAT_EQ(score_factor(parse(config)), static_cast<float>(mscale * mscale));
  config["rope_scaling"].erase("mscale_all_dim");
  EXPECT_FLOAT_EQ(score_factor(parse(config)), 1);
  config["rope_scaling"] = {{"rope_type", "default"}, {"factor", 40.0}, {"mscale_all_dim", 0.7}};
  EXPECT_FLOAT_EQ(score_factor(parse(config)), 1);
}

TEST(Config, FillsInWhatMayBeLeftOut) {
  Json config = gqa_config();
  for (const char* key : {"num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
                          "dtype", "hidden_act", "rope_parameters"}) {
    config.erase(key);
  }
  const ModelConfig found = parse(config);
  EXPECT_EQ(found.gqa->num_key_value_heads, 6);
  EXPECT_EQ(found.gqa->head_dim, 4);
  EXPECT_EQ(found.max_position_embeddings, 2048);
  EXPECT_FALSE(found.tie_word_embeddings);
  EXPECT_EQ(found.dtype, DType::f32);
  EXPECT_NEAR(static_cast<double>(found.rotary.inv_freq[1]), 0.01, 1e-8);
}

TEST(Config, EitherNameOfTheDtype) {
  Json config = gqa_config();
  config.erase("dtype");
  config["torch_dtype"] = "float16";
  EXPECT_EQ(parse(config).dtype, DType::f16);
  config["dtype"] = "bfloat16";
  EXPECT_EQ(parse(config).dtype, DType::bf16);
}

TEST(Config, SlidingWindows) {
  Json config = gqa_config();
  config["sliding_window"] = 32;
  EXPECT_EQ(parse(config).attention.front().window, 32);
  config["use_sliding_window"] = true;
  EXPECT_EQ(parse(config).attention.front().window, 32);
  config["use_sliding_window"] = false;
  EXPECT_EQ(parse(config).attention.front().window, std::nullopt);
  config["use_sliding_window"] = nullptr;
  config["sliding_window"] = nullptr;
  EXPECT_EQ(parse(config).attention.front().window, std::nullopt);
}

TEST(Config, SizesMustBePositiveWholeNumbers) {
  const std::vector<const char*> gqa_sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads",
                                              "intermediate_size", "vocab_size"};
  const std::vector<const char*> mla_sizes = {"kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                                              "v_head_dim"};
  for (const bool latent : {false, true}) {
    for (const char* key : latent ? mla_sizes : gqa_sizes) {
      Json config = latent ? mla_config() : gqa_config();
      config.erase(key);
      expect_error(ErrorKind::input, {"folder/config.json", key, "a positive whole number", "nothing"},
                   [&] { parse(config); });
    }
  }
  for (const char* key : {"hidden_size", "max_position_embeddings", "num_key_value_heads", "head_dim"}) {
    for (const char* value : {"\"24\"", "24.5", "-8", "0", "true", "[24]", "2147483648",
                              "9223372036854775807", "18446744073709551615", "1e3"}) {
      SCOPED_TRACE(std::string(key) + " " + value);
      Json config = gqa_config();
      config[key] = Json::parse(value);
      expect_error(ErrorKind::input, {"folder/config.json", key, "a positive whole number"},
                   [&] { parse(config); });
    }
  }
}

Json experts_config(TopkMethod method) {
  return testing_support::tiny_latent_model({.experts = testing_support::tiny_experts(method)}).config;
}

TEST(Config, ReadsExperts) {
  for (const auto& [method, name] : topk_methods) {
    const bool sigmoid = method == TopkMethod::noaux_tc;
    EXPECT_EQ(topk_method_name(method), name);
    Json config = experts_config(method);
    config["scoring_func"] = sigmoid ? "sigmoid" : "softmax";
    const ModelConfig found = parse(config);
    EXPECT_EQ(found.model_type, sigmoid ? "deepseek_v3" : "deepseek_v2");
    ASSERT_TRUE(found.experts);
    EXPECT_EQ(found.experts->first_layer, 1);
    EXPECT_EQ(found.experts->count, 8);
    EXPECT_EQ(found.experts->shared_size, 20);
    EXPECT_EQ(found.experts->intermediate_size, 10);
    EXPECT_EQ(found.experts->per_token, 3);
    EXPECT_EQ(found.experts->topk_method, method);
    EXPECT_EQ(found.experts->groups, method == TopkMethod::greedy ? 1 : 4);
    EXPECT_EQ(found.experts->groups_per_token, method == TopkMethod::greedy ? 1 : 2);
    EXPECT_EQ(found.experts->normalised, sigmoid);
    EXPECT_EQ(found.experts->scale, 1.5);
    EXPECT_FALSE(found.has_experts(0));
    EXPECT_TRUE(found.has_experts(1));
    EXPECT_TRUE(found.has_experts(2));
    EXPECT_EQ(found.prediction_layers, 0);
    // Left out, the model type decides.
    for (const char* key : {"scoring_func", "moe_layer_freq", "norm_topk_prob"}) {
      config.erase(key);
    }
    if (method != TopkMethod::group_limited_greedy) {
      config.erase("topk_method");
    }
    EXPECT_EQ(parse(config).experts->topk_method, method);
    EXPECT_EQ(parse(config).experts->normalised, sigmoid);
    // Dense models say so by the number of their layers, and nothing else is looked at.
    config["first_k_dense_replace"] = 3;
    config["n_group"] = 5;
    EXPECT_FALSE(parse(config).experts);
    EXPECT_FALSE(parse(config).has_experts(2));
  }
}

TEST(Config, ReadsExpertsByOtherNames) {
  Json config = testing_support::tiny_mixture_model({.model_type = "mixtral"}).config;
  ModelConfig found = parse(config);
  ASSERT_TRUE(found.experts);
  EXPECT_EQ(found.experts->count, 5);
  EXPECT_EQ(found.experts->per_token, 2);
  EXPECT_EQ(found.experts->intermediate_size, 40);
  EXPECT_EQ(found.experts->topk_method, TopkMethod::greedy);
  EXPECT_TRUE(found.experts->normalised);
  EXPECT_EQ(found.experts->shared_size, 0);
  EXPECT_EQ(found.expert_layers(), 3);

  config = testing_support::tiny_mixture_model({.model_type = "qwen2_moe", .layers = 7}).config;
  found = parse(config);
  ASSERT_TRUE(found.experts);
  EXPECT_EQ(found.experts->count, 5);
  EXPECT_EQ(found.experts->intermediate_size, 10);
  EXPECT_EQ(found.experts->shared_size, 14);
  EXPECT_TRUE(found.experts->shared_gate);
  EXPECT_FALSE(found.experts->normalised);
  EXPECT_EQ(found.expert_layers(), 6);
  EXPECT_FALSE(found.has_experts(1));
  config["norm_topk_prob"] = true;
  EXPECT_TRUE(parse(config).experts->normalised);
  // Every so many-th layer, counted from 1, and of those not the named ones.
  config["decoder_sparse_step"] = 2;
  config["mlp_only_layers"] = {1, 4};
  found = parse(config);
  EXPECT_EQ(found.expert_layers(), 2);
  for (Index i = 0; i < 7; ++i) {
    EXPECT_EQ(found.has_experts(i), i == 3 || i == 5) << i;
  }
  // Nothing is shared where the family has no shared expert, and heads are as wide as the config says.
  Json qwen3_config = testing_support::tiny_mixture_model({.model_type = "qwen3_moe"}).config;
  qwen3_config["num_local_experts"] = qwen3_config["num_experts"];
  qwen3_config.erase("num_experts");
  // A window that nobody says is used is not.
  qwen3_config["sliding_window"] = 16;
  EXPECT_FALSE(parse(qwen3_config).attention.front().window);
  qwen3_config["use_sliding_window"] = true;
  EXPECT_EQ(parse(qwen3_config).attention.back().window, 16);
  qwen3_config["use_sliding_window"] = false;
  const ModelConfig qwen3 = parse(qwen3_config);
  EXPECT_EQ(qwen3.experts->count, 5);
  EXPECT_EQ(qwen3.experts->shared_size, 0);
  EXPECT_FALSE(qwen3.experts->shared_gate);
  EXPECT_EQ(qwen3.gqa->qk_norm, QkNorm::head);
  EXPECT_EQ(qwen3.gqa->head_dim, 8);
  // Dense models say so in three ways.
  config["mlp_only_layers"] = {1, 3, 5};
  EXPECT_FALSE(parse(config).experts);
  config["mlp_only_layers"] = nullptr;
  config["decoder_sparse_step"] = 8;
  EXPECT_FALSE(parse(config).experts);
  config["decoder_sparse_step"] = 1;
  config["num_experts"] = 0;
  EXPECT_FALSE(parse(config).experts);
}

TEST(Config, RefusesMixturesThatCannotBe) {
  const std::vector<std::tuple<const char*, std::string, std::vector<std::string>>> cases = {
      {"mixtral", R"({"num_experts_per_tok": 6})", {"num_experts_per_tok", "at most 5", "a layer", "6"}},
      {"mixtral", R"({"num_local_experts": null})", {"num_local_experts", "nothing"}},
      {"mixtral", R"({"num_local_experts": 65537})", {"num_local_experts", "65536"}},
      {"mixtral", R"({"scoring_func": "sigmoid"})", {"scoring_func", "softmax", "sigmoid"}},
      {"mixtral", R"({"hidden_act": "relu"})", {"hidden_act", "silu", "relu"}},
      {"qwen2_moe", R"({"num_experts_per_tok": 6})", {"num_experts_per_tok", "at most 5", "6"}},
      {"qwen2_moe", R"({"num_experts": -1})", {"num_experts", "-1"}},
      {"qwen2_moe", R"({"decoder_sparse_step": 0})", {"decoder_sparse_step", "0"}},
      {"qwen2_moe", R"({"mlp_only_layers": 1})", {"mlp_only_layers", "a list of layers from 0 to 2"}},
      {"qwen2_moe", R"({"mlp_only_layers": [3]})", {"mlp_only_layers", "a list of layers", "3"}},
      {"qwen2_moe", R"({"mlp_only_layers": ["1"]})", {"mlp_only_layers", "a list of layers"}},
      {"qwen2_moe", R"({"shared_expert_intermediate_size": null})", {"shared_expert_intermediate_size"}},
      {"qwen2_moe", R"({"moe_intermediate_size": null})", {"moe_intermediate_size"}},
      {"qwen2_moe", R"({"norm_topk_prob": 1})", {"norm_topk_prob", "true or false"}},
      {"qwen2_moe", R"({"scoring_func": "tanh"})", {"scoring_func", "softmax", "tanh"}},
      {"qwen2_moe", R"({"qkv_bias": false})", {"qkv_bias", "true"}},
      {"qwen2_moe", R"({"use_sliding_window": true})", {"use_sliding_window", "false"}},
      {"qwen2_moe", R"({"hidden_act": "relu"})", {"hidden_act", "silu", "relu"}},
  };
  for (const auto& [model_type, changes, wanted] : cases) {
    SCOPED_TRACE(changes);
    Json config = testing_support::tiny_mixture_model({.model_type = model_type}).config;
    config.merge_patch(Json::parse(changes));
    std::vector<std::string> parts = wanted;
    parts.emplace_back("folder/config.json");
    expect_error(ErrorKind::input, parts, [&] { parse(config); });
  }
}

TEST(Config, DeepseekV2HasPairsAndV3PredictionLayers) {
  Json config = experts_config(TopkMethod::greedy);
  config["rope_interleave"] = false;
  config["num_nextn_predict_layers"] = 1;
  EXPECT_TRUE(parse(config).latent->rope_interleave);
  EXPECT_EQ(parse(config).prediction_layers, 0);
  config = experts_config(TopkMethod::noaux_tc);
  config["rope_interleave"] = false;
  config["num_mtp_layers"] = 2;
  EXPECT_FALSE(parse(config).latent->rope_interleave);
  EXPECT_EQ(parse(config).prediction_layers, 2);
  config["num_nextn_predict_layers"] = 1;
  EXPECT_EQ(parse(config).prediction_layers, 1);
}

TEST(Config, RefusesExpertsThatCannotBe) {
  struct Case {
    TopkMethod method;
    std::string changes;
    std::vector<std::string> parts;
  };
  using enum TopkMethod;
  const std::vector<Case> cases = {
      {noaux_tc, R"({"moe_layer_freq": 2})", {"moe_layer_freq", "1 (experts in every layer", "2"}},
      {noaux_tc, R"({"n_routed_experts": null})", {"n_routed_experts", "null"}},
      {noaux_tc, R"({"n_shared_experts": 0})", {"n_shared_experts", "0"}},
      {noaux_tc, R"({"moe_intermediate_size": "10"})", {"moe_intermediate_size"}},
      {noaux_tc, R"({"num_experts_per_tok": null})", {"num_experts_per_tok"}},
      {noaux_tc, R"({"routed_scaling_factor": null})", {"routed_scaling_factor", "a number"}},
      {noaux_tc, R"({"norm_topk_prob": 1})", {"norm_topk_prob", "true or false"}},
      {noaux_tc, R"({"topk_method": "greedy"})", {"topk_method", "expected noaux_tc", "greedy"}},
      {noaux_tc, R"({"scoring_func": "softmax"})", {"scoring_func", "sigmoid", "noaux_tc"}},
      {noaux_tc, R"({"n_group": 3})", {"n_group", "a divisor of n_routed_experts = 8", "3"}},
      {noaux_tc, R"({"n_group": 8})", {"n_group", "at least 2", "8"}},
      {noaux_tc, R"({"n_group": null})", {"n_group"}},
      {noaux_tc, R"({"topk_group": 5})", {"topk_group", "at most n_group = 4"}},
      {noaux_tc, R"({"num_experts_per_tok": 5})", {"num_experts_per_tok", "at most 4", "topk_group"}},
      {greedy, R"({"num_experts_per_tok": 9})", {"num_experts_per_tok", "at most 8", "a layer"}},
      {greedy, R"({"topk_method": "noaux_tc"})", {"topk_method", "greedy or group_limited_greedy"}},
      {greedy, R"({"scoring_func": "sigmoid"})", {"scoring_func", "softmax"}},
      {greedy, R"({"norm_topk_prob": true})", {"norm_topk_prob", "disagree"}},
      {group_limited_greedy, R"({"topk_group": null})", {"topk_group"}},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.changes);
    Json config = experts_config(test.method);
    const Json changes = Json::parse(test.changes);
    for (const auto& [key, value] : changes.items()) {
      config[key] = value;
    }
    std::vector<std::string> parts = test.parts;
    parts.emplace_back("folder/config.json");
    expect_error(ErrorKind::input, parts, [&] { parse(config); });
  }
}

TEST(Config, Refusals) {
  struct Case {
    std::string changes;  // merged into the config
    std::vector<std::string> parts;
    bool latent = false;
  };
  const std::vector<Case> cases = {
      {R"({"model_type": "gpt2"})", {"model_type", "llama, mistral, qwen2, qwen3", "deepseek_v3", "gpt2"}},
      {R"({"model_type": 3})", {"model_type", "a string", "3"}},
      {R"({"model_type": null})", {"model_type", "a string", "null"}},
      {R"({"rms_norm_eps": null})", {"rms_norm_eps", "a number", "null"}},
      {R"({"rms_norm_eps": "1e-5"})", {"rms_norm_eps", "a number"}},
      {R"({"tie_word_embeddings": "yes"})", {"tie_word_embeddings", "true or false", "yes"}},
      {R"({"hidden_act": "gelu"})", {"hidden_act", "silu", "gelu"}},
      {R"({"hidden_act": 1})", {"hidden_act"}},
      {R"({"dtype": "int8"})", {"dtype", "bfloat16, float16 or float32", "int8"}},
      {R"({"dtype": null, "torch_dtype": "float8"})", {"torch_dtype", "float8"}},
      {R"({"quantization_config": {"bits": 4}})", {"quantization_config", "unquantised"}},
      {R"({"num_key_value_heads": 4})", {"num_key_value_heads", "a divisor of num_attention_heads = 6", "4"}},
      {R"({"num_key_value_heads": 12})", {"num_key_value_heads", "a divisor", "12"}},
      {R"({"head_dim": null, "hidden_size": 25})", {"head_dim", "not a multiple"}},
      {R"({"head_dim": 7})", {"rotary size", "even", "7"}},
      {R"({"model_type": "seed_oss", "attention_bias": false})", {"attention_bias", "true", "false"}},
      {R"({"model_type": "seed_oss", "attention_out_bias": true})", {"attention_out_bias", "false", "true"}},
      {R"({"model_type": "seed_oss", "mlp_bias": true})", {"mlp_bias", "false", "true"}},
      {R"({"sliding_window": "all"})", {"sliding_window"}},
      {R"({"sliding_window": 8, "use_sliding_window": 1})", {"use_sliding_window", "true or false"}},
      {R"({"partial_rotary_factor": 0.5})", {"partial_rotary_factor"}},
      {R"({"rope_parameters": {"rope_type": "spiral"}})", {"rope_type", "spiral"}},
      {R"({"first_k_dense_replace": 2})", {"n_routed_experts", "nothing"}, true},
      {R"({"first_k_dense_replace": null})", {"first_k_dense_replace", "whole number", "null"}, true},
      {R"({"quantization_config": {"quant_method": "fp8"}})",
       {"quantization_config", "FP8 weights", "weight_scale_inv", "bfloat16"},
       true},
      {R"({"num_nextn_predict_layers": -1})", {"num_nextn_predict_layers"}, true},
      {R"({"q_lora_rank": 0})", {"q_lora_rank"}, true},
      {R"({"q_lora_rank": "9"})", {"q_lora_rank"}, true},
      {R"({"attention_bias": 1})", {"attention_bias", "true or false"}, true},
      {R"({"qk_rope_head_dim": 5})", {"rotary size", "even", "5"}, true},
      {R"({"rope_parameters": {"rope_type": "yarn", "factor": "40", "mscale_all_dim": 1}})",
       {"factor"},
       true},
      {R"({"rope_parameters": {"rope_type": "yarn", "factor": 40, "mscale_all_dim": "1"}})",
       {"mscale_all_dim"},
       true},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.changes);
    Json config = test.latent ? mla_config() : gqa_config();
    const Json changes = Json::parse(test.changes);
    for (const auto& [key, value] : changes.items()) {
      config[key] = value;
    }
    std::vector<std::string> parts = test.parts;
    parts.emplace_back("folder/config.json");
    expect_error(ErrorKind::input, parts, [&] { parse(config); });
  }
}

}  // namespace
}  // namespace relatent
