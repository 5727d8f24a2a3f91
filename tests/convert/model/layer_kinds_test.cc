// Layers that differ: windows, kinds of attention, lists of rotary frequencies, and what the cache of such
// models costs.
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "convert/engines/relatent.h"
#include "convert/model/placement.h"
#include "tests/support/expect_error.h"
#include "tests/support/parsed_config.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;
using testing_support::expect_error;
using testing_support::parse;
using testing_support::sample_rotary;
using testing_support::tiny_config;
using testing_support::tiny_model;

using Windows = std::vector<std::optional<Index>>;

Windows windows_of(const ModelConfig& config) {
  Windows out;
  for (const AttentionSpec& spec : config.attention) {
    out.push_back(spec.window);
  }
  return out;
}

// As transformers' classes of these names have them.
TEST(LayerKinds, WindowsByFamily) {
  struct Case {
    std::string model_type;
    std::string changes;  // merged into the config
    Windows expected;
  };
  constexpr std::nullopt_t all = std::nullopt;
  const std::vector<Case> cases = {
      {"mistral", "{}", {4096, 4096, 4096}},
      {"mistral", R"({"sliding_window": null})", {all, all, all}},
      {"mistral", R"({"sliding_window": 16})", {16, 16, 16}},
      {"qwen2", R"({"sliding_window": 16, "max_window_layers": 1})", {all, all, all}},
      {"qwen2",
       R"({"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": false})",
       {all, all, all}},
      {"qwen2", R"({"sliding_window": 0, "use_sliding_window": false})", {all, all, all}},
      {"qwen2",
       R"({"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": true})",
       {all, 16, 16}},
      {"qwen2",
       R"({"sliding_window": 16, "max_window_layers": 0, "use_sliding_window": true})",
       {16, 16, 16}},
      {"qwen2", R"({"sliding_window": 16, "use_sliding_window": true})", {all, all, all}},
      {"qwen2",
       R"({"sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1,
           "layer_types": ["sliding_attention", "full_attention", "full_attention"]})",
       {16, all, all}},
      {"qwen3",
       R"({"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": true})",
       {all, 16, 16}},
      {"gemma2", R"({"sliding_window": 16})", {16, all, 16}},
      {"gemma2",
       R"({"layer_types": ["full_attention", "full_attention", "sliding_attention"]})",
       {all, all, 4096}},
      {"gemma3_text", R"({"sliding_window": 16, "rope_parameters": null})", {16, 16, 16}},
      {"gemma3_text", R"({"rope_parameters": null, "sliding_window_pattern": 3})", {4096, 4096, all}},
      {"llama", R"({"sliding_window": 16})", {16, 16, 16}},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.model_type + " " + test.changes);
    Json config = tiny_config({.model_type = test.model_type});
    const Json changes = Json::parse(test.changes);
    config.merge_patch(changes);
    for (const auto& [key, value] : changes.items()) {
      config[key] = value;  // nulls too
    }
    if (test.model_type.starts_with("gemma")) {
      config.erase("hidden_act");
    }
    EXPECT_EQ(windows_of(parse(config)), test.expected);
  }
}

TEST(LayerKinds, WindowRefusals) {
  Json config = tiny_config({.model_type = "qwen2"});
  config["layer_types"] = {"full_attention", "full_attention"};
  expect_error(ErrorKind::input, {"layer_types", "each of the 3 layers"}, [&] { parse(config); });
  config["layer_types"] = {"full_attention", "linear_attention", "full_attention"};
  expect_error(ErrorKind::input, {"layer_types", "sliding_attention or full_attention"},
               [&] { parse(config); });
  config["layer_types"] = {"full_attention", "sliding_attention", "full_attention"};
  expect_error(ErrorKind::input, {"sliding_window", "layer_types"}, [&] { parse(config); });
  config["use_sliding_window"] = true;
  config["sliding_window"] = nullptr;
  expect_error(ErrorKind::input, {"sliding_window", "layer_types"}, [&] { parse(config); });
}

TEST(LayerKinds, Gemma2) {
  Json config = tiny_model({.model_type = "gemma2"}).config;
  ModelConfig found = parse(config);
  EXPECT_EQ(found.activation, Activation::gelu_tanh);
  EXPECT_EQ(found.norms, NormPlacement::both);
  EXPECT_TRUE(found.norm_unit_offset);
  EXPECT_NEAR(found.embedding_multiplier, std::sqrt(24.0), 1e-12);
  EXPECT_EQ(found.attn_logit_softcapping, 3.0);
  EXPECT_EQ(found.final_logit_softcapping, 5.0);
  EXPECT_NEAR(static_cast<double>(found.attention[1].scale), 1 / std::sqrt(11.0), 1e-7);
  EXPECT_EQ(windows_of(found), (Windows{9, std::nullopt, 9}));
  config["attn_logit_softcapping"] = nullptr;
  EXPECT_EQ(parse(config).attn_logit_softcapping, std::nullopt);
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
                          "tie_word_embeddings", "sliding_window"}) {
    config.erase(key);
  }
  found = parse(config);
  EXPECT_EQ(found.attn_logit_softcapping, 50.0);
  EXPECT_EQ(found.final_logit_softcapping, 30.0);
  EXPECT_EQ(found.attention[1].scale, 1.0F / 16);
  EXPECT_TRUE(found.tie_word_embeddings);
  EXPECT_EQ(windows_of(found), (Windows{4096, std::nullopt, 4096}));

  const auto refused = [&](const char* key, const Json& value, const std::vector<std::string>& parts) {
    Json other = config;
    other[key] = value;
    expect_error(ErrorKind::input, parts, [&] { parse(other); });
  };
  refused("hidden_activation", "relu", {"hidden_activation", "gelu_pytorch_tanh", "relu"});
  refused("attention_bias", true, {"attention_bias", "false"});
  refused("use_bidirectional_attention", true, {"use_bidirectional_attention", "false"});
  refused("attn_logit_softcapping", 0, {"attn_logit_softcapping", "a number from 0.1"});
  refused("query_pre_attn_scalar", -1, {"query_pre_attn_scalar"});
  refused("head_dim", nullptr, {"head_dim"});
}

TEST(LayerKinds, Gemma3HasTwoListsOfFrequencies) {
  Json config = tiny_model({.model_type = "gemma3_text"}).config;
  const auto second = [](const ModelConfig& found, Index layer) {
    return static_cast<double>(found.rotary_of(layer).inv_freq[1]);
  };
  ModelConfig found = parse(config);
  EXPECT_EQ(found.gqa->qk_norm, QkNorm::head);
  EXPECT_EQ(found.attn_logit_softcapping, std::nullopt);
  EXPECT_EQ(found.final_logit_softcapping, std::nullopt);
  EXPECT_EQ(windows_of(found), (Windows{9, std::nullopt, 9}));
  EXPECT_NEAR(second(found, 0), std::pow(50.0, -0.25), 1e-7);
  EXPECT_NEAR(second(found, 1), std::pow(100.0, -0.25) / 3, 1e-7);
  EXPECT_NEAR(second(found, 2), std::pow(50.0, -0.25), 1e-7);
  EXPECT_EQ(found.rotary.rope_type, "linear");

  // The spelling of published configs.
  config.erase("rope_parameters");
  config["rope_theta"] = 200.0;
  config["rope_local_base_freq"] = 30.0;
  config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8.0}};
  found = parse(config);
  EXPECT_NEAR(second(found, 0), std::pow(30.0, -0.25), 1e-7);
  EXPECT_NEAR(second(found, 1), std::pow(200.0, -0.25) / 8, 1e-7);
  for (const char* key : {"rope_theta", "rope_local_base_freq", "rope_scaling"}) {
    config.erase(key);
  }
  found = parse(config);
  EXPECT_NEAR(second(found, 0), std::pow(1e4, -0.25), 1e-7);
  EXPECT_NEAR(second(found, 1), std::pow(1e6, -0.25), 1e-7);

  config["rope_parameters"] = {{"full_attention", 3}};
  expect_error(ErrorKind::input, {"rope_parameters", "full_attention"}, [&] { parse(config); });
  config["rope_parameters"] = 3;
  expect_error(ErrorKind::input, {"rope_parameters", "an object"}, [&] { parse(config); });
  config["rope_parameters"] = {{"sliding_attention", {{"rope_type", "spiral"}}}};
  expect_error(ErrorKind::input, {"rope_type", "spiral"}, [&] { parse(config); });
}

// Three layers of latents or grouped-query attention, the last with a window.
ModelConfig mixed_config(Json* config = nullptr) {
  const std::unique_ptr<Engine> engine = make_relatent_engine();
  Json source_config = tiny_config({});
  ModelConfig source = parse(source_config);
  source.other_rotaries = {sample_rotary(8)};
  source.attention[2].window = 16;
  source.attention[2].rotary = 0;
  source.attention[2].scale = 0.3F;
  LatentShape shape = testing_support::rich_shape(6);
  shape.carried = {LayerSet({0, 2}), true, false};
  const Json written = engine->config(source_config, source, shape, sample_rotary(4), DType::bf16);
  if (config != nullptr) {
    *config = written;
  }
  return parse(written);
}

TEST(LayerKinds, OwnLayoutSaysWhichLayersAreWhat) {
  const ModelConfig found = mixed_config();
  ASSERT_TRUE(found.gqa && found.latent);
  EXPECT_FALSE(found.is_latent(0));
  EXPECT_TRUE(found.is_latent(1));
  EXPECT_FALSE(found.is_latent(2));
  EXPECT_EQ(windows_of(found), (Windows{std::nullopt, std::nullopt, 16}));
  EXPECT_EQ(found.attention[2].scale, 0.3F);
  EXPECT_NEAR(static_cast<double>(found.attention[0].scale), 1 / std::sqrt(8.0), 1e-7);
  EXPECT_EQ(found.gqa->head_dim, 8);
  EXPECT_EQ(found.gqa->num_key_value_heads, 2);
  EXPECT_TRUE(found.gqa->qkv_bias);
  EXPECT_FALSE(found.gqa->o_bias);
  EXPECT_EQ(found.rotary.inv_freq, sample_rotary(4).inv_freq);
  EXPECT_EQ(&found.rotary_of(1), &found.rotary);
  ASSERT_EQ(found.other_rotaries.size(), 2U);
  EXPECT_NEAR(static_cast<double>(found.rotary_of(0).inv_freq[1]), std::pow(100.0, -0.25), 1e-7);
  EXPECT_EQ(found.rotary_of(2).inv_freq, sample_rotary(8).inv_freq);
  for (const ExpectedTensor& tensor : expected_tensors(found)) {
    if (!is_attention(tensor.role)) {
      continue;
    }
    const bool grouped = tensor.role == Role::k_weight || tensor.role == Role::k_bias ||
                         tensor.role == Role::v_weight || tensor.role == Role::v_bias;
    const bool latent = tensor.role >= Role::q_a_weight;
    EXPECT_FALSE(found.is_latent(*tensor.layer_idx) ? grouped : latent) << tensor.name;
    EXPECT_FALSE(tensor.role == Role::o_bias && *tensor.layer_idx != 1) << tensor.name;
  }
}

// Carried layers and those of latents name lists of their own sizes.
TEST(LayerKinds, EachLayerOfLatentsMayHaveAList) {
  const std::unique_ptr<Engine> engine = make_relatent_engine();
  const Json source_config = tiny_config({});
  const ModelConfig source = parse(source_config);
  LatentShape shape = testing_support::rich_shape(6);
  shape.carried = {LayerSet({1}), true, false};
  std::vector<Rotary> lists = {sample_rotary(4), sample_rotary(4)};
  lists[1].inv_freq = {0.7F, 0.03F};
  lists[1].attention_factor = 1.5F;
  Json config = engine->config(source_config, source, shape, lists.front(), DType::bf16);
  EXPECT_EQ(config.at("layout_version"), 1);
  engine->put_layer_rotaries(lists, source, shape, config);
  EXPECT_EQ(config.at("layout_version"), 2);
  const ModelConfig found = parse(config);
  for (const auto& [layer, list] : {std::pair<Index, std::size_t>{0, 0}, {2, 1}}) {
    ASSERT_EQ(found.rotary_of(layer).inv_freq.size(), 2U);
    for (std::size_t i = 0; i < 2; ++i) {
      EXPECT_FLOAT_EQ(found.rotary_of(layer).inv_freq[i], lists[list].inv_freq[i]) << layer;
    }
    EXPECT_EQ(found.rotary_of(layer).attention_factor, lists[list].attention_factor);
  }
  EXPECT_EQ(found.rotary_of(1).inv_freq.size(), 4U);

  const auto refused = [&](const Json& named, const std::vector<std::string>& parts) {
    Json other = config;
    other["latent_rope_lists"] = named;
    expect_error(ErrorKind::input, parts, [&] { parse(other); });
  };
  refused(3, {"latent_rope_lists", "each of the 3 layers"});
  refused({1, nullptr}, {"latent_rope_lists", "each of the 3 layers"});
  refused({1, 2, 1}, {"latent_rope_lists", "layer 1, which is not latent"});
  refused({nullptr, nullptr, 1}, {"latent_rope_lists", "an index for layer 0"});
  refused({1, nullptr, -1}, {"latent_rope_lists", "an index for layer 2"});
  refused({1, nullptr, 3}, {"rope_lists", "one of index 3"});
  // A list of another size.
  refused({1, nullptr, 0}, {"factor"});
  config["layout_version"] = 3;
  expect_error(ErrorKind::input, {"layout_version", "1 or 2", "found 3"}, [&] { parse(config); });
}

TEST(LayerKinds, CacheOfTwoKinds) {
  const ModelConfig found = mixed_config();
  EXPECT_EQ(found.cache_elements(), 28);
  EXPECT_EQ(found.cache_elements(0), 32);
  EXPECT_EQ(found.cache_elements(1), 28);
  EXPECT_EQ(found.cache_bytes_per_token(), 2 * (32 + 28 + 32));
  EXPECT_EQ(found.cache_bytes(10), 2 * 10 * (32 + 28 + 32));
  // The window is full.
  EXPECT_EQ(found.cache_bytes(1000), 2 * (1000 * (32 + 28) + 16 * 32));
  EXPECT_EQ(found.cache_by_context().front(), 2 * (4096 * (32 + 28) + 16 * 32));
  EXPECT_FALSE(found.sliding_layers().empty());
  EXPECT_TRUE(found.is_sliding(2));
  EXPECT_FALSE(found.is_sliding(0));
  // One key/value head on each of two devices, and of the latents what each of them has.
  constexpr Index carried = 64;  // bytes of one token in both layers
  const Index latents = *found.cache_bytes_on_device(2, 1) - carried;
  EXPECT_EQ(latents, 2 * (4 + 5 + 4 + 4));
  EXPECT_EQ(found.cache_bytes_on_device(2, 1000), 1000 * (carried / 2 + latents) + 16 * carried / 2);
  EXPECT_EQ(found.cache_bytes_on_device(5, 1), std::nullopt);
}

TEST(LayerKinds, OwnLayoutRefusals) {
  Json config;
  mixed_config(&config);
  const auto refused = [&](const std::string& pointer, const Json& value,
                           const std::vector<std::string>& parts) {
    SCOPED_TRACE(pointer + " " + value.dump());
    Json other = config;
    other[Json::json_pointer(pointer)] = value;
    expect_error(ErrorKind::input, parts, [&] { parse(other); });
  };
  refused("/layers", Json::array(), {"layers", "each of the 3 layers"});
  refused("/layers", 3, {"layers", "a list"});
  refused("/layers/1", 3, {"layers", "objects and nulls"});
  refused("/layers/1", config["layers"][0], {"layers", "null for one layer at least"});
  refused("/layers/0/attention", "linear", {"layers: attention", "grouped_query", "linear"});
  refused("/layers/0/scaling", nullptr, {"layers: scaling", "a number"});
  refused("/layers/0/scaling", 0, {"layers: scaling", "a number from 1e-06"});
  refused("/layers/0/sliding_window", 0, {"layers: sliding_window", "positive"});
  refused("/layers/2/head_dim", 10, {"layers", "the same sizes and biases"});
  refused("/layers/0/qkv_bias", false, {"layers", "the same sizes and biases"});
  refused("/layers/0/qk_norm", "row", {"layers: qk_norm", "none, head or width", "row"});
  refused("/layers/0/num_key_value_heads", 4, {"layers: num_key_value_heads", "a divisor"});
  refused("/layers/0/rope_list", 2, {"rope_lists", "of index 2"});
  refused("/layers/0/rope_list", -1, {"layers: rope_list"});
  refused("/rope_lists", nullptr, {"rope_lists", "a list of rope parameters"});
  refused("/rope_lists/1", 7, {"rope_lists", "of index 1"});
  refused("/rope_lists/1/rope_type", "spiral", {"rope_type", "spiral"});
  refused("/norm_placement", "above", {"norm_placement", "before or both or behind", "above"});
  refused("/hidden_activation", "relu", {"hidden_activation", "silu or gelu_pytorch_tanh", "relu"});
  refused("/norm_unit_offset", 1, {"norm_unit_offset", "true or false"});
  refused("/embedding_multiplier", 0, {"embedding_multiplier", "a number"});
  refused("/final_logit_softcapping", -3, {"final_logit_softcapping", "a number"});
}

}  // namespace
}  // namespace relatent
