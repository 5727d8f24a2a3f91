// Numbers of a config that no model has, beside the nearest that one could have.
#include "convert/model/config_ranges.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "convert/model/config.h"
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

Json gqa_config() {
  return testing_support::tiny_config({});
}
Json mla_config() {
  return testing_support::tiny_latent_model({.q_rank = 9}).config;
}
Json experts_config() {
  return testing_support::tiny_latent_model({.experts = testing_support::tiny_experts()}).config;
}
Json relatent_config() {
  Json config = mla_config();
  config["model_type"] = "relatent";
  config.erase("first_k_dense_replace");
  config["latent_form"] = "gla";
  config["latent_norm"] = "branch";
  config["latent_shared_ranks"] = Json::array();
  const Json heads = config.at("num_attention_heads");
  config["latent_branches"] = {
      {{"first_head", 0}, {"num_heads", heads}, {"shared", nullptr}, {"rank", config.at("kv_lora_rank")}}};
  return config;
}
Json gguf_config() {
  return {{"general.architecture", "deepseek2"},
          {"general.file_type", 0},
          {"deepseek2.embedding_length", 24},
          {"deepseek2.block_count", 3},
          {"deepseek2.attention.head_count", 6},
          {"deepseek2.feed_forward_length", 40},
          {"deepseek2.vocab_size", 50},
          {"deepseek2.context_length", 128},
          {"deepseek2.attention.layer_norm_rms_epsilon", 1e-5F},
          {"deepseek2.attention.kv_lora_rank", 11},
          {"deepseek2.rope.dimension_count", 6},
          {"deepseek2.attention.key_length_mla", 11},
          {"deepseek2.attention.value_length_mla", 7},
          {"deepseek2.attention.q_lora_rank", 0},
          {"deepseek2.rope.freq_base", 1e4F}};
}

// Values of one key, at the top of a config or among its rotary parameters.
struct Key {
  std::string key;
  std::vector<Json> accepted;
  std::vector<Json> refused;
  std::string words;  // what the refusals say was expected
};

constexpr double infinite = std::numeric_limits<double>::infinity();
const Json nan_json = std::nan("");

void check(const std::vector<Key>& keys, const Json& config, const std::string& inside = "") {
  EXPECT_NO_THROW(parse(config));
  for (const Key& test : keys) {
    const auto with = [&](const Json& value) {
      Json out = config;
      (inside.empty() ? out : out[inside])[test.key] = value;
      return out;
    };
    for (const Json& value : test.accepted) {
      SCOPED_TRACE(test.key + " " + value.dump());
      EXPECT_NO_THROW(parse(with(value)));
    }
    for (const Json& value : test.refused) {
      SCOPED_TRACE(test.key + " " + value.dump());
      expect_error(ErrorKind::input, {"folder/config.json", test.key, test.words},
                   [&] { parse(with(value)); });
    }
  }
}

std::vector<Json> beyond(std::int64_t most) {
  return {
      most + 1, std::numeric_limits<std::int64_t>::max(), std::numeric_limits<std::uint64_t>::max(), -1, 1.5,
      infinite};
}

Key size(const std::string& key, std::int64_t most, std::vector<Json> accepted) {
  return {key, std::move(accepted), beyond(most),
          "a positive whole number of at most " + std::to_string(most)};
}

constexpr std::int64_t usual = 1 << 20;
constexpr std::int64_t small = 1 << 16;
constexpr std::int64_t heads = 1 << 14;
constexpr std::int64_t int32_most = 2147483647;

TEST(ConfigRanges, SizesOfGroupedQueryModels) {
  check({size("num_hidden_layers", 4096, {1, 126, 4096}), size("hidden_size", usual, {8, 16384, usual}),
         size("intermediate_size", usual, {1, 53248, usual}),
         size("num_attention_heads", heads, {2, 128, heads}), size("num_key_value_heads", heads, {1, 6}),
         size("head_dim", small, {2, 256, small}), size("vocab_size", int32_most, {1, 262144, int32_most}),
         size("max_position_embeddings", int32_most, {1, 10485760, int32_most}),
         size("sliding_window", int32_most, {1, 4096, int32_most})},
        gqa_config());
}

TEST(ConfigRanges, SizesOfLatentModels) {
  const std::vector<Key> keys = {
      size("kv_lora_rank", usual, {1, 512, usual}),     size("q_lora_rank", usual, {1, 1536, usual}),
      size("qk_nope_head_dim", small, {0, 128, small}), size("qk_rope_head_dim", small, {2, 64, small}),
      size("v_head_dim", small, {1, 128, small}),       size("num_nextn_predict_layers", 4096, {0, 1, 4096})};
  check(keys, mla_config());
  check({size("n_routed_experts", small, {8, 256, small}), size("n_shared_experts", small, {1, 2, small}),
         size("num_experts_per_tok", small, {1, 4}), size("moe_intermediate_size", usual, {1, 2048, usual})},
        experts_config());
}

TEST(ConfigRanges, SizesInsideListsOfLatents) {
  check({}, relatent_config());
  Json config = relatent_config();
  const auto refused = [&](const std::vector<std::string>& parts) {
    expect_error(ErrorKind::input, parts, [&] { parse(config); });
  };
  config["latent_branches"][0]["rank"] = usual + 1;
  refused({"latent_branches: rank", "at most 1048576", "1048577"});
  config = relatent_config();
  config["latent_branches"] = Json(1025, config["latent_branches"][0]);
  refused({"latent_branches", "a list of latents, 1 to 1024"});
  config = relatent_config();
  config["latent_shared_ranks"] = Json(1025, 1);
  refused({"latent_shared_ranks", "a list of whole numbers, 1024 at most"});
  config["latent_shared_ranks"] = {std::numeric_limits<std::uint64_t>::max()};
  refused({"latent_shared_ranks", "positive whole numbers"});
}

TEST(ConfigRanges, NumbersOutsideTheRotation) {
  const Key eps = {"rms_norm_eps",
                   {1e-30, 1e-12, 1e-6, 1e-5, 0.1},
                   {0, 0.0, -0.001, -1e308, 1e-31, 0.11, 1, 1e30, infinite, -infinite, nan_json, "1e-6"},
                   "a number from 1e-30 to 0.1"};
  for (const Json& config :
       {gqa_config(), mla_config(), relatent_config(), testing_support::tiny_gla_model().config}) {
    check({eps}, config);
  }
  check({{"routed_scaling_factor",
          {0.001, 1, 1.0, 2.5, 16.0, 1000},
          {0, -1, 1001, 1e308, infinite, nan_json},
          "a number from 0.001 to 1000"}},
        experts_config());
}

TEST(ConfigRanges, GgufFiles) {
  check(
      {size("deepseek2.block_count", 4096, {1, 4096}),
       size("deepseek2.attention.head_count", heads, {1, heads}),
       size("deepseek2.vocab_size", int32_most, {1, int32_most}),
       size("deepseek2.context_length", int32_most, {1, int32_most}),
       size("deepseek2.embedding_length", usual, {1, usual}),
       {"deepseek2.attention.layer_norm_rms_epsilon", {1e-6F}, {0, infinite, nan_json}, "from 1e-30 to 0.1"},
       {"deepseek2.rope.freq_base", {1, 1e4F, 1e6F}, {0, 0.5, 1e21, infinite, nan_json}, "from 1 to 1e+20"}},
      gguf_config());
}

TEST(ConfigRanges, ComplaintsSayWhatWasFoundAndWhatToTry) {
  Json config = gqa_config();
  config["rms_norm_eps"] = infinite;
  expect_error(ErrorKind::input, {"rms_norm_eps", "found inf", "what the authors of the model published"},
               [&] { parse(config); });
  config["rms_norm_eps"] = -0.001;
  expect_error(ErrorKind::input, {"rms_norm_eps", "found -0.001", "published"}, [&] { parse(config); });
}

// Each type of rotation in the words of published configs, and what its numbers may be.
struct Rotation {
  Json parameters;
  std::vector<Key> keys;
};

const Key factor = {"factor",
                    {1, 1.0, 4, 40.0, 1e6},
                    {0, 0.5, -3, 1e7, 1e300, infinite, nan_json, "4", nullptr},
                    "a number from 1 to 1000000"};
const Key original = {"original_max_position_embeddings",
                      {2, 4096, 8192.0, int32_most},
                      {0, -1, 0.5, 1e10, infinite, nan_json},
                      "a number from 1 to 2147483647"};
const Key attention_factor = {"attention_factor",
                              {nullptr, 0.001, 1, 1.0, 1.25, 1000},
                              {0, -5, 1001, infinite, nan_json, "1", true},
                              "a number from 0.001 to 1000"};
const Key theta = {"rope_theta",
                   {1.5, 10000, 10000.0, 5e5, 4.6e10, 1e20},
                   {0, -1, 0.5, 1e21, 1e300, infinite, nan_json, "1e4"},
                   "a number from 1 to 1e+20"};
const Key truncate = {"truncate", {true, false, nullptr}, {0, "no"}, "true or false"};
const Key mscale = {
    "mscale", {0, 0.707, 1, 100}, {-1, 101, infinite, nan_json, "1"}, "a number from 0 to 100"};
const Key mscale_all_dim = {"mscale_all_dim", mscale.accepted, mscale.refused, mscale.words};

const std::vector<Rotation>& rotations() {
  const Key beta_range = {
      "beta_fast", {1.5, 32, 1e6}, {0, -1, 2e6, infinite, nan_json}, "from 0.001 to 1000000"};
  const Key beta_order = {"beta_fast", {}, {1, 0.5}, "more than beta_slow"};
  const Key beta_slow = {"beta_slow", {0.001, 1, 31.5}, {0, -1, 2e6, infinite, nan_json}, "from 0.001"};
  const Key low_freq = {"low_freq_factor", {0.001, 1, 3.5}, {0, -1, 2e6, infinite, nan_json}, "from 0.001"};
  const Key high_freq = {"high_freq_factor", {1.5, 4, 1e6}, {0, -1, 2e6, infinite, nan_json}, "from 0.001"};
  const Key freq_order = {"high_freq_factor", {}, {1, 0.5}, "more than low_freq_factor"};
  const Key yarn_theta = {"rope_theta", {}, {1}, "more than 1"};
  static const std::vector<Rotation> all = {
      {{{"rope_type", "default"}, {"rope_theta", 10000.0}}, {theta, {"rope_theta", {1}, {}, ""}}},
      {{{"type", "linear"}, {"factor", 2}}, {factor, theta}},
      // Llama 3.1.
      {{{"rope_type", "llama3"},
        {"factor", 8.0},
        {"low_freq_factor", 1.0},
        {"high_freq_factor", 4.0},
        {"original_max_position_embeddings", 8192}},
       {factor, original, low_freq, high_freq, freq_order, theta}},
      // Qwen2.5, which leaves attention_factor and the betas out.
      {{{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32768}},
       {factor, original, attention_factor, beta_range, beta_order, beta_slow, truncate, yarn_theta, theta}},
      // DeepSeek-V2-Lite.
      {{{"beta_fast", 32},
        {"beta_slow", 1},
        {"factor", 40},
        {"mscale", 0.707},
        {"mscale_all_dim", 0.707},
        {"original_max_position_embeddings", 4096},
        {"type", "yarn"}},
       {factor, original, attention_factor, beta_range, beta_order, mscale, mscale_all_dim, theta}}};
  return all;
}

TEST(ConfigRanges, NumbersOfTheRotation) {
  for (const Json& model : {gqa_config(), mla_config()}) {
    for (const char* spelling : {"rope_scaling", "rope_parameters"}) {
      for (const Rotation& rotation : rotations()) {
        SCOPED_TRACE(std::string(spelling) + " " + rotation.parameters.dump());
        Json config = model;
        config.erase("rope_parameters");
        config["rope_theta"] = 10000;
        config[spelling] = rotation.parameters;
        check(rotation.keys, config, spelling);
        if (!rotation.parameters.contains("rope_theta")) {
          check({theta}, config);
        }
      }
    }
  }
}

TEST(ConfigRanges, ListsOfFactors) {
  Json config = gqa_config();  // vectors of 8
  Json& rope = config["rope_parameters"];
  rope = {{"rope_type", "longrope"},
          {"rope_theta", 1},
          {"factor", 4},
          {"original_max_position_embeddings", 512},
          {"short_factor", {1, 1.5, 2, 1e22}},
          {"long_factor", {1, 1.5, 2, 1e22}}};
  Key without_null = factor;  // which here is the ratio of the lengths
  without_null.refused.pop_back();
  without_null.accepted.emplace_back(nullptr);
  check({without_null, original, attention_factor}, config, "rope_parameters");
  for (const Json& bad : {Json(0), Json(-1), Json(1e23), Json(1e-23), Json(infinite), nan_json, Json("1")}) {
    SCOPED_TRACE(bad.dump());
    for (const char* list : {"short_factor", "long_factor"}) {
      Json changed = config;
      changed["rope_parameters"][list][2] = bad;
      expect_error(ErrorKind::input, {"config.json", list, "4 positive numbers from 1e-22"},
                   [&] { parse(changed); });
    }
  }
  // The logarithm of the original length divides, where no attention factor is given.
  rope["original_max_position_embeddings"] = 1;
  expect_error(ErrorKind::input, {"original_max_position_embeddings", "at least 2"}, [&] { parse(config); });
  rope["attention_factor"] = 1.25;
  EXPECT_NO_THROW(parse(config));
}

TEST(ConfigRanges, RotaryParametersAreAnObjectOrNothing) {
  for (const Json& model : {gqa_config(), mla_config(), testing_support::tiny_gla_model().config}) {
    check({{"rope_scaling", {nullptr, Json::object()}, {5, "abc", true, Json::array()}, "null or an object"},
           {"rope_parameters",
            {nullptr, Json::object()},
            {5, "abc", true, Json::array()},
            "null or an object"}},
          model);
  }
}

// A length that is null, which transformers writes for keys without a value, is one that is not given.
TEST(ConfigRanges, NullIsNotGiven) {
  Json config = gqa_config();
  config["max_position_embeddings"] = nullptr;
  config["rope_parameters"] = {
      {"rope_type", nullptr}, {"type", "yarn"}, {"factor", 4}, {"rope_theta", nullptr}};
  config["rope_theta"] = 100;
  const ModelConfig found = parse(config);
  EXPECT_EQ(found.rotary.rope_type, "yarn");
  config["max_position_embeddings"] = 2048;
  config["rope_parameters"]["rope_theta"] = 100;
  EXPECT_EQ(parse(config).rotary.inv_freq, found.rotary.inv_freq);
}

// The softmax's scale and the rotation are read from the same object.
TEST(ConfigRanges, AnEmptyScalingHidesNothing) {
  Json config = mla_config();
  config["rope_parameters"] = {{"rope_type", "yarn"},
                               {"factor", 40},
                               {"mscale_all_dim", 1.0},
                               {"original_max_position_embeddings", 64}};
  const float scale = parse(config).attention.front().scale;
  config["rope_scaling"] = Json::object();
  EXPECT_EQ(parse(config).attention.front().scale, scale);
  EXPECT_EQ(parse(config).rotary.rope_type, "yarn");
}

}  // namespace
}  // namespace relatent
