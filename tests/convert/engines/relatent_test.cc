#include "convert/engines/relatent.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <variant>
#include <vector>

#include "convert/model/model.h"
#include "tests/support/expect_error.h"
#include "tests/support/latents.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"
#include "tests/support/written.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;
using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::latent_samples;
using testing_support::LatentSample;
using testing_support::output_by_the_book;
using testing_support::output_of;
using testing_support::Random;
using testing_support::random_latent;
using testing_support::relative_error;
using testing_support::sample_inputs;
using testing_support::shape_of;
using testing_support::TempFolder;
using testing_support::TinyOptions;

constexpr Index hidden = 24;

TinyOptions body_of(const LatentSample& sample) {
  return {.layers = 2, .heads = sample.heads, .kv_heads = 1};
}

Model write_and_open(const LatentAttention& layer, const LatentSample& sample, DType dtype,
                     const TempFolder& folder) {
  return testing_support::write_and_open(*make_relatent_engine(), layer, shape_of(sample), body_of(sample),
                                         dtype, folder);
}

void expect_equal(const Linear& found, const Linear& expected) {
  EXPECT_TRUE(found.weight == expected.weight);
  EXPECT_TRUE(found.bias == expected.bias);
}

TEST(RelatentEngine, ConfigSaysWhichLayersHaveExpertsAndWhatIsShared) {
  const LatentSample sample = latent_samples().front();
  Random random(2);
  const testing_support::TinyModel body = tiny_body(body_of(sample), random);
  ModelConfig source = parse_config(body.config, "config.json");
  source.num_hidden_layers = 6;
  source.attention.resize(6, source.attention.front());
  source.experts = testing_support::tiny_experts(TopkMethod::greedy);
  ExpertsGeometry& experts = *source.experts;
  const auto config_of = [&] {
    return make_relatent_engine()->config(body.config, source, shape_of(sample),
                                          testing_support::sample_rotary(6, 1), DType::f32);
  };
  Json config = config_of();
  EXPECT_EQ(config["n_shared_experts"], 2);
  EXPECT_FALSE(config.contains("mlp_only_layers"));
  EXPECT_FALSE(config.contains("shared_expert_intermediate_size"));
  experts.shared_size = 0;
  config = config_of();
  EXPECT_EQ(config["n_shared_experts"], 0);
  EXPECT_EQ(parse_config(config, "config.json").experts->shared_size, 0);
  experts.shared_size = 14;
  experts.shared_gate = true;
  experts.dense_layers = {2, 4};
  config = config_of();
  EXPECT_EQ(config["n_shared_experts"], 0);
  EXPECT_EQ(config["shared_expert_intermediate_size"], 14);
  EXPECT_EQ(config["mlp_only_layers"], Json({2, 4}));
  const ModelConfig found = parse_config(config, "config.json");
  EXPECT_EQ(found.experts->shared_size, 14);
  EXPECT_TRUE(found.experts->shared_gate);
  EXPECT_EQ(found.experts->dense_layers, (std::vector<Index>{2, 4}));
  EXPECT_EQ(found.expert_layers(), 3);
  const auto refused = [&](const char* key, const Json& value, std::vector<std::string> parts) {
    Json changed = config;
    changed[key] = value;
    parts.emplace_back(key);
    expect_error(ErrorKind::input, parts, [&] { parse_config(changed, "config.json"); });
  };
  refused("n_shared_experts", 2, {"0 beside shared_expert_intermediate_size"});
  refused("mlp_only_layers", {1, 2}, {"a list of layers from 2 to 5"});
}

TEST(RelatentEngine, ConfigSaysHowExpertsAreChosen) {
  const LatentSample sample = latent_samples().front();
  Random random(2);
  const testing_support::TinyModel body = tiny_body(body_of(sample), random);
  ModelConfig source = parse_config(body.config, "config.json");
  const auto config_of = [&] {
    return make_relatent_engine()->config(body.config, source, shape_of(sample),
                                          testing_support::sample_rotary(6, 1), DType::f32);
  };
  const Json dense = config_of();
  EXPECT_FALSE(dense.contains("first_k_dense_replace"));
  EXPECT_FALSE(parse_config(dense, "config.json").experts);
  for (const TopkMethod method :
       {TopkMethod::greedy, TopkMethod::group_limited_greedy, TopkMethod::noaux_tc}) {
    source.experts = testing_support::tiny_experts(method);
    const Json config = config_of();
    EXPECT_EQ(config.at("scoring_func"), method == TopkMethod::noaux_tc ? "sigmoid" : "softmax");
    const std::optional<ExpertsGeometry> found = parse_config(config, "config.json").experts;
    ASSERT_TRUE(found);
    EXPECT_EQ(found->first_layer, source.experts->first_layer);
    EXPECT_EQ(found->count, source.experts->count);
    EXPECT_EQ(found->shared_size, source.experts->shared_size);
    EXPECT_EQ(found->intermediate_size, source.experts->intermediate_size);
    EXPECT_EQ(found->per_token, source.experts->per_token);
    EXPECT_EQ(found->topk_method, method);
    EXPECT_EQ(found->groups, source.experts->groups);
    EXPECT_EQ(found->groups_per_token, source.experts->groups_per_token);
    EXPECT_EQ(found->normalised, source.experts->normalised);
    EXPECT_EQ(found->scale, source.experts->scale);
    Json other = config;
    other["topk_method"] = nullptr;
    expect_error(ErrorKind::input, {"topk_method", "a string"}, [&] { parse_config(other, "config.json"); });
  }
}

TEST(RelatentEngine, WhatIsWrittenReadsBackAsTheLayer) {
  for (const LatentSample& sample : latent_samples()) {
    SCOPED_TRACE(sample.name);
    const TempFolder folder;
    Random random(3);
    const LatentAttention layer = random_latent(random, sample, hidden);
    const MatrixF x = sample_inputs(random, 30, hidden);
    const Model model = write_and_open(layer, sample, DType::f32, folder);
    EXPECT_EQ(model.config().model_type, "relatent");
    EXPECT_EQ(model.config().dtype, DType::f32);
    EXPECT_EQ(model.config().cache_elements(), layer.total_rank() + layer.rope_dim);

    const auto back = std::get<LatentAttention>(model.attention(1));
    EXPECT_EQ(back.heads, layer.heads);
    EXPECT_EQ(back.nope_dim, layer.nope_dim);
    EXPECT_EQ(back.rope_dim, layer.rope_dim);
    EXPECT_EQ(back.v_dim, layer.v_dim);
    // The scale goes into the query; all the rest is stored as it is.
    const double rescale = static_cast<double>(layer.scale) / static_cast<double>(back.scale);
    EXPECT_NEAR(static_cast<double>(back.scale) * std::sqrt(static_cast<double>(layer.nope_dim + 6)), 1,
                1e-6);
    EXPECT_LE(relative_error(back.q.weight, rescale * layer.q.weight.cast<double>()), 1e-6);
    EXPECT_LE(relative_error(back.q.bias, rescale * layer.q.bias.cast<double>()), 1e-6);
    expect_equal(back.q_down, layer.q_down);
    EXPECT_TRUE(back.q_norm.gain == layer.q_norm.gain);
    EXPECT_EQ(back.q_norm.eps, layer.q_norm.eps);
    expect_equal(back.rotary_key, layer.rotary_key);
    expect_equal(back.o, layer.o);
    EXPECT_TRUE(back.norm_rows == layer.norm_rows);
    EXPECT_EQ(back.norm_eps, layer.norm_eps);
    ASSERT_EQ(back.shared.size(), layer.shared.size());
    for (std::size_t s = 0; s < layer.shared.size(); ++s) {
      expect_equal(back.shared[s], layer.shared[s]);
    }
    ASSERT_EQ(back.branches.size(), layer.branches.size());
    for (std::size_t b = 0; b < layer.branches.size(); ++b) {
      const LatentBranch& found = back.branches[b];
      const LatentBranch& expected = layer.branches[b];
      expect_equal(found.down, expected.down);
      EXPECT_TRUE(found.up == expected.up);
      EXPECT_TRUE(found.norm.gain == expected.norm.gain);
      EXPECT_EQ(found.shared, expected.shared);
      EXPECT_EQ(found.first_head, expected.first_head);
      EXPECT_EQ(found.head_count, expected.head_count);
    }
    ASSERT_EQ(back.rotary.inv_freq.size(), 3U);
    for (Index i = 0; i < 2; ++i) {
      EXPECT_LE(relative_error(output_of(model.attention(i), x), output_by_the_book(layer, x)), kFloatNoise);
    }
  }
}

TEST(RelatentEngine, RoundsToTheDtype) {
  for (const auto& [dtype, bits] : {std::pair{DType::f16, 11}, std::pair{DType::bf16, 8}}) {
    for (const LatentSample& sample : latent_samples()) {
      SCOPED_TRACE(sample.name + " " + std::string(torch_name(dtype)));
      const TempFolder folder;
      Random random(4);
      const LatentAttention layer = random_latent(random, sample, hidden);
      const MatrixF x = sample_inputs(random, 30, hidden);
      const Model model = write_and_open(layer, sample, dtype, folder);
      EXPECT_EQ(model.config().dtype, dtype);
      // As for the other layouts: a few roundings of 2^-bits.
      const double error = relative_error(output_of(model.attention(0), x), output_by_the_book(layer, x));
      EXPECT_LE(error, std::exp2(-bits) * 8);
      EXPECT_GT(error, std::exp2(-bits) / 8);
    }
  }
}

// A layer may lack a bias that others have.
TEST(RelatentEngine, AMissingBiasIsZero) {
  const LatentSample sample{.name = "", .bias = true};
  const TempFolder folder;
  Random random(5);
  LatentAttention layer = random_latent(random, sample, hidden);
  layer.q.bias.resize(0);
  layer.shared[0].bias.resize(0);
  layer.branches[1].down.bias.resize(0);
  layer.o.bias.resize(0);
  const auto back = std::get<LatentAttention>(write_and_open(layer, sample, DType::f32, folder).attention(0));
  EXPECT_TRUE(back.q.bias == RowVectorF::Zero(Index{6} * 11));
  EXPECT_TRUE(back.shared[0].bias == RowVectorF::Zero(3));
  EXPECT_TRUE(back.branches[1].down.bias == RowVectorF::Zero(4));
  EXPECT_TRUE(back.branches[0].down.bias == layer.branches[0].down.bias);
  EXPECT_TRUE(back.o.bias == RowVectorF::Zero(hidden));
}

TEST(RelatentEngine, ShapesOfTheTensors) {
  const auto engine = make_relatent_engine();
  const Json source_config = testing_support::tiny_config({.layers = 5});
  const ModelConfig source = parse_config(source_config, "config.json");
  const auto shapes = [&](const LatentSample& sample) {
    std::map<std::string, std::vector<std::int64_t>> out;
    for (const ExpectedTensor& spec : testing_support::attention_tensors(*engine, source_config, source,
                                                                         shape_of(sample), 4, DType::bf16)) {
      const std::string prefix = "model.layers.4.self_attn.";
      EXPECT_EQ(spec.name.rfind(prefix, 0), 0U) << spec.name;
      out[spec.name.substr(prefix.size())] = spec.shape;
    }
    return out;
  };
  using Shapes = std::map<std::string, std::vector<std::int64_t>>;
  const Shapes plain = {{"q_proj.weight", {66, 24}},          {"k_rope_proj.weight", {6, 24}},
                        {"kv_shared_proj.0.weight", {3, 24}}, {"kv_shared_proj.1.weight", {3, 24}},
                        {"kv_a_proj.0.weight", {4, 24}},      {"kv_a_proj.1.weight", {4, 24}},
                        {"kv_a_proj.2.weight", {4, 24}},      {"kv_a_proj.3.weight", {5, 24}},
                        {"kv_b_proj.0.weight", {36, 7}},      {"kv_b_proj.1.weight", {36, 7}},
                        {"kv_b_proj.2.weight", {36, 7}},      {"kv_b_proj.3.weight", {36, 8}},
                        {"o_proj.weight", {24, 42}}};
  LatentSample sample{.name = "", .form = "mlra"};
  EXPECT_EQ(shapes(sample), plain);
  sample.bias = true;
  Shapes expected = plain;
  expected.insert({{"q_proj.bias", {66}},
                   {"k_rope_proj.bias", {6}},
                   {"kv_shared_proj.0.bias", {3}},
                   {"kv_shared_proj.1.bias", {3}},
                   {"kv_a_proj.0.bias", {4}},
                   {"kv_a_proj.1.bias", {4}},
                   {"kv_a_proj.2.bias", {4}},
                   {"kv_a_proj.3.bias", {5}},
                   {"o_proj.bias", {24}}});
  EXPECT_EQ(shapes(sample), expected);
  sample.norm = LatentNorm::branch;
  sample.bias = false;
  expected = plain;
  expected.insert({{"kv_a_layernorm.0.weight", {7}},
                   {"kv_a_layernorm.1.weight", {7}},
                   {"kv_a_layernorm.2.weight", {7}},
                   {"kv_a_layernorm.3.weight", {8}}});
  EXPECT_EQ(shapes(sample), expected);
  sample.norm = LatentNorm::replicated;
  sample.q_rank = 9;
  expected = plain;
  expected.erase("q_proj.weight");
  expected.insert({{"q_a_proj.weight", {9, 24}},
                   {"q_a_layernorm.weight", {9}},
                   {"q_b_proj.weight", {66, 9}},
                   {"kv_norm_proj.weight", {10, 24}}});
  EXPECT_EQ(shapes(sample), expected);
  EXPECT_EQ(engine->written_config(source_config, source, shape_of(sample), DType::bf16).cache_elements(),
            11 + 12 + 6);
  EXPECT_TRUE(engine->traits().any_frequencies);
}

Json config_of(const LatentSample& sample, const TinyOptions& body = {.layers = 2}) {
  const auto engine = make_relatent_engine();
  const Json source_config = testing_support::tiny_config(body);
  const ModelConfig source = parse_config(source_config, "config.json");
  // What is on disk is text.
  return Json::parse(engine
                         ->config(source_config, source, shape_of(sample),
                                  testing_support::sample_rotary(6, 1.25F), DType::bf16)
                         .dump());
}

TEST(RelatentEngine, ConfigSaysHowTheLatentIsDivided) {
  const Json config =
      config_of({.name = "", .form = "mlra", .norm = LatentNorm::replicated}, {.layers = 2, .tied = true});
  const Json expected = Json::parse(R"({
    "architectures": ["RelatentForCausalLM"], "model_type": "relatent", "attention_bias": false,
    "dtype": "bfloat16", "hidden_act": "silu", "hidden_size": 24, "intermediate_size": 40, "kv_lora_rank": 23,
    "latent_form": "mlra", "latent_norm": "replicated", "latent_norm_rank": 10, "latent_shared_ranks": [3, 3],
    "latent_branches": [
      {"first_head": 0, "num_heads": 3, "shared": 0, "rank": 4}, {"first_head": 3, "num_heads": 3, "shared": 1, "rank": 4},
      {"first_head": 0, "num_heads": 3, "shared": 0, "rank": 4}, {"first_head": 3, "num_heads": 3, "shared": 1, "rank": 5}],
    "q_lora_rank": null, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 7,
    "max_position_embeddings": 128, "num_attention_heads": 6, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": true, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": [1, 2]})");
  for (const auto& [key, value] : expected.items()) {
    ASSERT_TRUE(config.contains(key)) << key;
    EXPECT_EQ(config[key], value) << key;
  }
  const Json gla = config_of({.name = "", .form = "gla"});
  EXPECT_EQ(gla["latent_branches"][1],
            Json::parse(R"({"first_head": 3, "num_heads": 3, "shared": null, "rank": 12})"));
  EXPECT_EQ(gla["latent_shared_ranks"], Json::array());
  EXPECT_EQ(gla["latent_norm"], "none");
  EXPECT_TRUE(gla["latent_norm_rank"].is_null());
  EXPECT_EQ(config_of({.name = "", .norm = LatentNorm::branch})["latent_norm"], "branch");
  // The code that auto_map names lies beside it.
  std::map<std::string, std::string_view> files;
  for (const ExtraFile& file : make_relatent_engine()->extra_files()) {
    files[file.name] = file.text;
  }
  for (const auto& [kind, place] : config["auto_map"].items()) {
    const auto text = place.get<std::string>();
    const std::size_t dot = text.find('.');
    const std::string file = text.substr(0, dot) + ".py";
    ASSERT_TRUE(files.contains(file)) << file;
    EXPECT_NE(files[file].find("class " + text.substr(dot + 1)), std::string_view::npos) << kind;
  }
}

TEST(RelatentConfig, ReadsBackEveryForm) {
  for (const LatentSample& sample : latent_samples()) {
    SCOPED_TRACE(sample.name);
    const LatentShape shape = shape_of(sample);
    const LatentSizes& expected = shape;
    const ModelConfig found = parse_config(config_of(sample, body_of(sample)), "config.json");
    ASSERT_TRUE(found.latent.has_value());
    EXPECT_EQ(found.latent->form, expected.form);
    EXPECT_EQ(found.latent->kv_lora_rank, expected.kv_lora_rank);
    EXPECT_EQ(found.latent->q_lora_rank, expected.q_lora_rank);
    EXPECT_EQ(found.latent->attention_bias, expected.attention_bias);
    EXPECT_FALSE(found.latent->rope_interleave);
    EXPECT_EQ(found.latent->shared_ranks, expected.shared_ranks);
    EXPECT_EQ(found.latent->norm, expected.norm);
    EXPECT_EQ(found.latent->norm_rank, expected.norm_rank);
    ASSERT_EQ(found.latent->branches.size(), expected.branches.size());
    for (std::size_t b = 0; b < expected.branches.size(); ++b) {
      EXPECT_EQ(found.latent->branches[b].first_head, expected.branches[b].first_head);
      EXPECT_EQ(found.latent->branches[b].head_count, expected.branches[b].head_count);
      EXPECT_EQ(found.latent->branches[b].rank, expected.branches[b].rank);
      EXPECT_EQ(found.latent->branches[b].shared, expected.branches[b].shared);
    }
    EXPECT_EQ(found.rotary.attention_factor, 1.25F);
  }
}

TEST(RelatentConfig, CountsTheCacheOfTheFullestDevice) {
  // Ranks 11, 12, 13 and 14 beside a rotary key of 6; two layers of bfloat16.
  const ModelConfig gla = parse_config(config_of({.name = "", .form = "gla", .branches = 4}), "config.json");
  EXPECT_EQ(gla.cache_bytes_per_token(), (50 + 6) * 4);
  EXPECT_EQ(gla.cache_bytes_per_token_on_device(1), (50 + 6) * 4);
  EXPECT_EQ(gla.cache_bytes_per_token_on_device(2), (27 + 6) * 4);
  EXPECT_EQ(gla.cache_bytes_per_token_on_device(4), (14 + 6) * 4);
  EXPECT_FALSE(gla.cache_bytes_per_token_on_device(8).has_value());
  EXPECT_FALSE(gla.cache_bytes_per_token_on_device(3).has_value());
}

TEST(RelatentConfig, RefusesWhatDoesNotFitTogether) {
  const LatentSample sample{.name = "", .form = "mlra"};
  EXPECT_NO_THROW(parse_config(config_of(sample), "config.json"));
  const auto refused = [&](const std::vector<std::string>& parts, const std::function<void(Json&)>& change) {
    Json config = config_of(sample);
    change(config);
    std::vector<std::string> all = parts;
    all.emplace_back("config.json");
    expect_error(ErrorKind::input, all, [&] { parse_config(config, "config.json"); });
  };
  // Heads that no latent serves, in the middle and at the end.
  refused({"latent_branches", "a latent for every head"}, [](Json& c) {
    c["latent_branches"][1]["first_head"] = 4;
    c["latent_branches"][1]["num_heads"] = 2;
    c["latent_branches"][3]["first_head"] = 4;
    c["latent_branches"][3]["num_heads"] = 2;
  });
  refused({"latent_branches", "a latent for every head"}, [](Json& c) {
    c["latent_branches"][1]["num_heads"] = 2;
    c["latent_branches"][3]["num_heads"] = 2;
  });
  refused({"latent_branches", "heads below num_attention_heads = 6"},
          [](Json& c) { c["latent_branches"][1]["num_heads"] = 4; });
  refused({"kv_lora_rank", "23, the sum over latents", "24"}, [](Json& c) { c["kv_lora_rank"] = 24; });
  refused({"kv_lora_rank", "24, the sum over latents", "23"},
          [](Json& c) { c["latent_branches"][2]["rank"] = 5; });
  refused({"latent_branches", "\"shared\" below the length of latent_shared_ranks"},
          [](Json& c) { c["latent_branches"][0]["shared"] = 2; });
  refused({"shared"}, [](Json& c) { c["latent_branches"][0]["shared"] = -1; });
  refused({"latent_branches", "latents that share coordinates to serve the same heads"}, [](Json& c) {
    c["latent_branches"][0]["shared"] = 1;
    c["latent_branches"][1]["shared"] = 0;
  });
  refused({"latent_shared_ranks", "a list of positive whole numbers"},
          [](Json& c) { c["latent_shared_ranks"][0] = 0; });
  refused({"latent_shared_ranks", "a list of positive whole numbers"},
          [](Json& c) { c["latent_shared_ranks"][0] = "3"; });
  refused({"latent_shared_ranks", "a list of whole numbers"},
          [](Json& c) { c.erase("latent_shared_ranks"); });
  refused({"latent_branches", "a list of latents"}, [](Json& c) { c["latent_branches"] = Json::array(); });
  refused({"latent_branches", "a list of latents"}, [](Json& c) { c.erase("latent_branches"); });
  refused({"latent_branches", "a list of objects"}, [](Json& c) { c["latent_branches"][2] = 4; });
  refused({"rank", "a positive whole number"}, [](Json& c) { c["latent_branches"][2]["rank"] = 0; });
  refused({"num_heads", "a positive whole number"},
          [](Json& c) { c["latent_branches"][2].erase("num_heads"); });
  refused({"first_head"}, [](Json& c) { c["latent_branches"][2]["first_head"] = -3; });
  refused({"latent_norm", "none, branch or replicated"}, [](Json& c) { c["latent_norm"] = "layer"; });
  refused({"latent_norm_rank"}, [](Json& c) { c["latent_norm"] = "replicated"; });
  refused({"latent_form"}, [](Json& c) { c.erase("latent_form"); });
}

// Weights that are not those of the config.
TEST(RelatentConfig, RefusesTensorsOfAnotherShape) {
  const LatentSample sample{.name = "", .form = "mlra"};
  const TempFolder folder;
  Random random(6);
  write_and_open(random_latent(random, sample, hidden), sample, DType::f32, folder);
  Json config = Json::parse(testing_support::read_bytes(folder / "config.json"));
  config["latent_branches"][1]["rank"] = 5;
  config["latent_branches"][3]["rank"] = 4;
  write_text(folder / "config.json", config.dump());
  expect_error(ErrorKind::input, {"kv_a_proj.1.weight"}, [&] { Model::open(folder.path()); });
  config["latent_branches"][1]["rank"] = 4;
  config["latent_branches"][3]["rank"] = 5;
  config["latent_norm"] = "branch";
  write_text(folder / "config.json", config.dump());
  expect_error(ErrorKind::input, {"kv_a_layernorm.0.weight"}, [&] { Model::open(folder.path()); });
}

TEST(Engine, OfTheFormsIsTransformersToo) {
  for (const std::string form : {"gla", "tpla", "mlra"}) {
    const auto engine = make_engine("transformers", form);
    ASSERT_NE(engine, nullptr);
    EXPECT_EQ(engine->name(), "relatent");
    EXPECT_FALSE(engine->extra_files().empty());
    EXPECT_EQ(make_engine("deepseek", form), nullptr);
    EXPECT_EQ(make_engine("vllm", form), nullptr);
  }
  EXPECT_TRUE(make_engine("transformers", "mla")->extra_files().empty());
}

}  // namespace
}  // namespace relatent
