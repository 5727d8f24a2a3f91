#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "convert/model/config.h"
#include "convert/model/families/family.h"
#include "convert/model/placement.h"
#include "tests/support/author_layouts.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::layer_name;
using testing_support::mlra_samples;
using testing_support::TempFolder;
using testing_support::tiny_experts;
using testing_support::tiny_gla_model;
using testing_support::tiny_latent_model;
using testing_support::tiny_mixture_model;
using testing_support::tiny_mlra_model;
using testing_support::tiny_model;
using testing_support::TinyModel;

std::vector<PlacedTensor> place(const TinyModel& model) {
  const TempFolder folder;
  model.write(folder.path());
  const Checkpoint checkpoint = Checkpoint::open(folder.path());
  return place_tensors(checkpoint, parse_config(checkpoint.config(), checkpoint.config_path()));
}

TEST(Families, AreFoundByName) {
  ASSERT_NE(find_family("qwen2"), nullptr);
  EXPECT_EQ(find_family("llama")->read_latent, nullptr);
  EXPECT_NE(find_family("deepseek_v3")->read_latent, nullptr);
  EXPECT_EQ(find_family("gla")->model_type, "llama");
  EXPECT_EQ(find_family(""), nullptr);
  EXPECT_EQ(
      known_families(),
      "llama, mistral, qwen2, qwen3, seed_oss, phi3, glm4, smollm3, granite, olmo2, mixtral, qwen2_moe, "
      "qwen3_moe, gemma2, gemma3_text, deepseek_v2, deepseek_v3, relatent, gpt2 (with the key mlra_model), "
      "llama "
      "(with the key qk_rope_dim), deepseek2 (with the key general.architecture)");
}

TEST(Families, AttentionIsWhatAConversionReplaces) {
  for (const Role role : {Role::q_weight, Role::q_bias, Role::k_bias, Role::v_weight, Role::o_weight,
                          Role::o_bias, Role::q_head_norm, Role::normed_k_weight, Role::q_a_norm,
                          Role::kv_a_bias, Role::kv_b_weight, Role::kv_b_bias}) {
    EXPECT_TRUE(is_attention(role));
  }
  for (const Role role : {Role::embed_tokens, Role::final_norm, Role::lm_head, Role::input_norm,
                          Role::post_attention_norm, Role::gate_weight, Role::down_bias, Role::inv_freq}) {
    EXPECT_FALSE(is_attention(role));
  }
}

TEST(Families, EveryTensorHasItsPlace) {
  std::vector<TinyModel> models = {
      tiny_model(),
      tiny_model({.tied = true, .dtype = DType::bf16}),
      tiny_model({.q_bias = true, .kv_bias = true, .o_bias = true, .dtype = DType::f16}),
      tiny_model({.model_type = "mistral"}),
      tiny_model({.model_type = "qwen2", .tied = true}),
      tiny_model({.model_type = "seed_oss"}),
      tiny_model({.model_type = "gemma2", .tied = true}),
      tiny_model({.model_type = "gemma3_text", .tied = true}),
      tiny_model({.model_type = "qwen3"}),
      tiny_model({.model_type = "qwen3", .q_bias = true, .kv_bias = true, .o_bias = true}),
      tiny_model({.model_type = "granite", .q_bias = true, .kv_bias = true, .o_bias = true}),
      tiny_model({.model_type = "smollm3"}),
      tiny_model({.model_type = "olmo2"}),
      tiny_mixture_model({.model_type = "mixtral"}),
      tiny_mixture_model({.model_type = "qwen2_moe"}),
      tiny_mixture_model({.model_type = "qwen3_moe"}),
      tiny_latent_model(),
      tiny_latent_model({.attention_bias = true}),
      tiny_latent_model({.q_rank = 9}),
      tiny_latent_model({.q_rank = 9, .attention_bias = true}),
      tiny_latent_model({.experts = tiny_experts()}),
      tiny_latent_model({.experts = tiny_experts(TopkMethod::greedy)}),
  };
  // Old checkpoints hold a buffer, tied ones the head a second time, some llamas biases in the MLP.
  models[1].put_vector(layer_name(2, "self_attn.rotary_emb.inv_freq"), RowVectorF::Ones(4));
  models[1].put("lm_head.weight", MatrixF::Ones(50, 24));
  models[0].put_vector(layer_name(1, "mlp.down_proj.bias"), RowVectorF::Ones(24));
  models[0].put_vector(layer_name(1, "mlp.gate_proj.bias"), RowVectorF::Ones(40));
  for (const TinyModel& model : models) {
    const std::vector<PlacedTensor> placed = place(model);
    std::set<std::string> names;
    std::set<std::tuple<Role, std::optional<Index>, std::optional<Index>>> places;
    for (const PlacedTensor& tensor : placed) {
      EXPECT_TRUE(model.tensors.contains(tensor.name)) << tensor.name;
      names.insert(tensor.name);
      places.emplace(tensor.role, tensor.layer_idx, tensor.part);
      const bool in_layer = tensor.name.find(".layers.") != std::string::npos;
      EXPECT_EQ(tensor.layer_idx.has_value(), in_layer) << tensor.name;
      if (in_layer) {
        EXPECT_NE(tensor.name.find(".layers." + std::to_string(*tensor.layer_idx) + "."), std::string::npos);
      }
      EXPECT_EQ(is_attention(tensor.role),
                tensor.name.find("self_attn") != std::string::npos && tensor.role != Role::inv_freq)
          << tensor.name;
    }
    EXPECT_EQ(names.size(), model.tensors.size());
    EXPECT_EQ(placed.size(), model.tensors.size());
    EXPECT_EQ(places.size(), placed.size());
  }
}

TEST(Families, WhatIsStoredInOneTensorIsPlacedInPieces) {
  const TinyModel model = testing_support::tiny_phi3_model(0.5);
  const ModelConfig config = parse_config(model.config, "config.json");
  std::set<std::string> stored;
  for (const ExpectedTensor& tensor : stored_tensors(config)) {
    if (tensor.presence == Presence::required) {
      stored.insert(tensor.name);
      EXPECT_EQ(tensor.shape, model.tensors.at(tensor.name).shape) << tensor.name;
    }
  }
  EXPECT_EQ(stored.size(), model.tensors.size());
  const TempFolder folder;
  model.write(folder.path());
  Checkpoint checkpoint = Checkpoint::open(folder.path());
  cut_fused_tensors(config, checkpoint);
  EXPECT_EQ(place_tensors(checkpoint, config).size(), model.tensors.size() + Index{3} * 3);
  TinyModel other = model;
  other.tensors.erase(layer_name(1, "self_attn.qkv_proj.weight"));
  std::filesystem::remove_all(folder.path());
  other.write(folder.path());
  Checkpoint without = Checkpoint::open(folder.path());
  expect_error(ErrorKind::input, {"layers.1.self_attn.qkv_proj.weight", "no such tensor"},
               [&] { cut_fused_tensors(config, without); });
}

TEST(Families, RolesOfTheNames) {
  struct Case {
    const char* name = nullptr;
    Role role = Role::embed_tokens;
    std::optional<Index> layer_idx{};
  };
  const std::vector<PlacedTensor> placed = place(tiny_latent_model({.q_rank = 9, .attention_bias = true}));
  for (const Case& test :
       {Case{"model.embed_tokens.weight", Role::embed_tokens, {}}, Case{"lm_head.weight", Role::lm_head, {}},
        Case{"model.layers.2.post_attention_layernorm.weight", Role::post_attention_norm, 2},
        Case{"model.layers.0.mlp.up_proj.weight", Role::up_weight, 0},
        Case{"model.layers.1.self_attn.q_a_layernorm.weight", Role::q_a_norm, 1},
        Case{"model.layers.1.self_attn.q_b_proj.weight", Role::q_weight, 1},
        Case{"model.layers.1.self_attn.kv_a_proj_with_mqa.bias", Role::kv_a_bias, 1},
        Case{"model.layers.2.self_attn.o_proj.bias", Role::o_bias, 2}}) {
    const auto at = std::find_if(placed.begin(), placed.end(),
                                 [&](const PlacedTensor& tensor) { return tensor.name == test.name; });
    ASSERT_NE(at, placed.end()) << test.name;
    EXPECT_EQ(at->role, test.role) << test.name;
    EXPECT_EQ(at->layer_idx, test.layer_idx) << test.name;
  }
}

// Every tensor of a layer, with the latent that it belongs to.
TEST(Families, PlacesInTheAuthorsLayouts) {
  struct Place {
    std::string name;
    Role role;
    std::optional<Index> part;
  };
  const auto expect_places = [](const TinyModel& model, const std::string& layer,
                                const std::vector<Place>& expected) {
    const std::vector<PlacedTensor> placed = place(model);
    EXPECT_EQ(placed.size(), model.tensors.size());
    std::size_t in_layer = 0;
    for (const PlacedTensor& tensor : placed) {
      in_layer += tensor.name.rfind(layer, 0) == 0 ? 1 : 0;
    }
    EXPECT_EQ(in_layer, expected.size());
    for (const Place& wanted : expected) {
      const auto at = std::find_if(placed.begin(), placed.end(), [&](const PlacedTensor& tensor) {
        return tensor.name == layer + wanted.name;
      });
      ASSERT_NE(at, placed.end()) << wanted.name;
      EXPECT_EQ(at->role, wanted.role) << wanted.name;
      EXPECT_EQ(at->part, wanted.part) << wanted.name;
      EXPECT_EQ(at->layer_idx, 1) << wanted.name;
    }
  };
  const std::vector<Place> mlra = {{"input_layernorm.weight", Role::input_norm, {}},
                                   {"post_attention_layernorm.weight", Role::post_attention_norm, {}},
                                   {"mlp.c_fc1.weight", Role::gate_weight, {}},
                                   {"mlp.c_fc2.weight", Role::up_weight, {}},
                                   {"mlp.c_proj.weight", Role::down_weight, {}},
                                   {"attn.q_a_proj.weight", Role::q_a_weight, {}},
                                   {"attn.q_a_layernorm.weight", Role::q_a_norm, {}},
                                   {"attn.q_b_proj.weight", Role::q_weight, {}},
                                   {"attn.kv_a_proj_with_mqa.weight", Role::kv_a_weight, {}},
                                   {"attn.c_proj.weight", Role::o_weight, {}}};
  for (const testing_support::MlraSample& sample : mlra_samples()) {
    SCOPED_TRACE(sample.model());
    std::vector<Place> expected = mlra;
    if (sample.model() == "gla_2") {
      expected.insert(expected.end(), {{"attn.kv_a_layernorm_1.weight", Role::kv_a_norm, 0},
                                       {"attn.kv_a_layernorm_2.weight", Role::kv_a_norm, 1},
                                       {"attn.kv_b_proj_1.weight", Role::kv_b_weight, 0},
                                       {"attn.kv_b_proj_2.weight", Role::kv_b_weight, 1}});
    } else {
      expected.insert(expected.end(), {{"attn.kv_a_layernorms.0.weight", Role::kv_a_norm, 0},
                                       {"attn.kv_a_layernorms.1.weight", Role::kv_a_norm, 1},
                                       {"attn.kv_a_layernorms.2.weight", Role::kv_a_norm, 2},
                                       {"attn.kv_a_layernorms.3.weight", Role::kv_a_norm, 3},
                                       {"attn.kv_b_proj", Role::kv_b_weight, {}}});
    }
    TinyModel model = tiny_mlra_model(sample);
    expect_places(model, "transformer.h.1.", expected);
    // A tied head may be stored all the same.
    model.put("lm_head.weight", MatrixF::Ones(50, 24));
    EXPECT_NO_THROW(place(model));
  }
  const std::string self = "self_attn.";
  expect_places(tiny_gla_model(), "model.layers.1.",
                {{"input_layernorm.weight", Role::input_norm, {}},
                 {"post_attention_layernorm.weight", Role::post_attention_norm, {}},
                 {"mlp.gate_proj.weight", Role::gate_weight, {}},
                 {"mlp.up_proj.weight", Role::up_weight, {}},
                 {"mlp.down_proj.weight", Role::down_weight, {}},
                 {self + "W_dQ.weight", Role::q_a_weight, {}},
                 {self + "W_dQ.bias", Role::q_a_bias, {}},
                 {self + "q_norm.weight", Role::q_a_norm, {}},
                 {self + "W_uQ_rope.weight", Role::q_weight, {}},
                 {self + "W_uQ_rope.bias", Role::q_bias, {}},
                 {self + "W_dKV.weight", Role::kv_a_weight, {}},
                 {self + "W_dKV.bias", Role::kv_a_bias, {}},
                 {self + "kv_norm_1.weight", Role::kv_a_norm, 0},
                 {self + "kv_norm_2.weight", Role::kv_a_norm, 1},
                 {self + "W_ukv_1.weight", Role::kv_b_weight, 0},
                 {self + "W_ukv_2.weight", Role::kv_b_weight, 1},
                 {self + "W_ukv_1.bias", Role::kv_b_bias, 0},
                 {self + "W_ukv_2.bias", Role::kv_b_bias, 1},
                 {self + "o_proj.weight", Role::o_weight, {}},
                 {self + "o_proj.bias", Role::o_bias, {}}});
}

// What is done to a model, and what is said of the result.
struct Refusal {
  std::string name;
  TinyModel model;
  std::function<void(TinyModel&)> spoil;
  std::vector<std::string> parts;
};

std::function<void(TinyModel&)> drop(const std::string& name) {
  return [name](TinyModel& model) { ASSERT_EQ(model.tensors.erase(name), 1U) << name; };
}

std::function<void(TinyModel&)> add(const std::string& name, const std::vector<std::int64_t>& shape) {
  return [name, shape](TinyModel& model) {
    Index size = 1;
    for (const std::int64_t n : shape) {
      size *= n;
    }
    model.put(name, shape, MatrixF::Ones(1, size));
  };
}

void expect_refused(const std::vector<Refusal>& cases) {
  for (const Refusal& test : cases) {
    SCOPED_TRACE(test.name);
    EXPECT_NO_THROW(place(test.model));
    TinyModel spoilt = test.model;
    test.spoil(spoilt);
    expect_error(ErrorKind::input, test.parts, [&] { place(spoilt); });
  }
}

TEST(Families, GroupedQueryRefusals) {
  const std::string q_bias = layer_name(1, "self_attn.q_proj.bias");
  const std::string k_weight = layer_name(2, "self_attn.k_proj.weight");
  expect_refused({
      {"a stranger",
       tiny_model(),
       add("model.extra.weight", {3}),
       {"no place in a llama model", "model.extra.weight"}},
      {"a layer too many",
       tiny_model(),
       add(layer_name(3, "input_layernorm.weight"), {24}),
       {"no place", "model.layers.3.input_layernorm.weight"}},
      {"two strangers",
       tiny_model(),
       [](TinyModel& model) {
         model.put_vector("a.scales", RowVectorF::Ones(2));
         model.put_vector("b.zeros", RowVectorF::Ones(2));
       },
       {"a.scales, b.zeros"}},
      {"a bias in mistral",
       tiny_model({.model_type = "mistral"}),
       add(q_bias, {48}),
       {"no place in a mistral", q_bias}},
      {"qwen2 without a bias",
       tiny_model({.model_type = "qwen2"}),
       drop(q_bias),
       {"qwen2", "missing", q_bias}},
      {"no k_proj", tiny_model(), drop(k_weight), {"missing", k_weight}},
      {"no embedding",
       tiny_model({.tied = true}),
       drop("model.embed_tokens.weight"),
       {"model.embed_tokens.weight"}},
      {"no head", tiny_model(), drop("lm_head.weight"), {"missing", "lm_head.weight"}},
      {"transposed",
       tiny_model(),
       add(k_weight, {24, 16}),
       {k_weight, "[16, 24] by config.json", "[24, 16]"}},
      {"layers far beyond what is stored",
       tiny_model(),
       [](TinyModel& model) { model.config["num_hidden_layers"] = 4096; },
       {"missing", "model.layers.10."}},
      {"one dimension too few", tiny_model(), add(k_weight, {Index{16} * 24}), {k_weight, "shape", "[384]"}},
      {"a bias of another size", tiny_model(), add(q_bias, {47}), {q_bias, "[48]", "[47]"}},
      {"whole numbers",
       tiny_model(),
       [&](TinyModel& model) { model.tensors.at(k_weight).dtype = DType::i32; },
       {k_weight, "dtype", "BF16, F16, F32 or F64", "I32"}},
  });
}

TEST(Families, LatentRefusals) {
  expect_refused({
      {"a bias that the config denies",
       tiny_latent_model(),
       add(layer_name(0, "self_attn.kv_a_proj_with_mqa.bias"), {17}),
       {"no place", "kv_a_proj_with_mqa.bias"}},
      {"a bias that the config promises",
       tiny_latent_model({.attention_bias = true}),
       drop(layer_name(0, "self_attn.o_proj.bias")),
       {"missing", "o_proj.bias"}},
      {"a query of the other kind",
       tiny_latent_model({.q_rank = 9}),
       [](TinyModel& model) { model.config["q_lora_rank"] = nullptr; },
       {"no place", "q_a_proj.weight"}},
      {"a latent norm of another size",
       tiny_latent_model(),
       add(layer_name(0, "self_attn.kv_a_layernorm.weight"), {12}),
       {"kv_a_layernorm.weight", "[11]", "[12]"}},
  });
}

TEST(Families, ExpertRefusals) {
  expect_refused({
      {"a router's bias that greedy choice has no use for",
       tiny_latent_model({.experts = tiny_experts(TopkMethod::greedy)}),
       add(layer_name(1, "mlp.gate.e_score_correction_bias"), {8}),
       {"no place in a deepseek_v2 model", "e_score_correction_bias"}},
      {"a router without its bias",
       tiny_latent_model({.experts = tiny_experts()}),
       drop(layer_name(1, "mlp.gate.e_score_correction_bias")),
       {"missing", "layers.1.mlp.gate.e_score_correction_bias"}},
      {"an expert too few",
       tiny_latent_model({.experts = tiny_experts()}),
       drop(layer_name(2, "mlp.experts.7.up_proj.weight")),
       {"missing", "layers.2.mlp.experts.7.up_proj"}},
      {"an expert too many",
       tiny_latent_model({.experts = tiny_experts()}),
       add(layer_name(2, "mlp.experts.8.up_proj.weight"), {10, 24}),
       {"no place", "layers.2.mlp.experts.8.up_proj"}},
      // Too many to be listed one by one.
      {"layers and experts far beyond what is stored",
       tiny_latent_model({.experts = tiny_experts()}),
       [](TinyModel& model) {
         model.config["num_hidden_layers"] = 4096;
         model.config["n_routed_experts"] = 65536;
       },
       {"config.json", "asks for more tensors", "805", "4096 layers of 65536 experts"}},
      {"experts in a dense layer",
       tiny_latent_model({.experts = tiny_experts()}),
       add(layer_name(0, "mlp.experts.0.up_proj.weight"), {10, 24}),
       {"no place", "layers.0.mlp.experts.0.up_proj"}},
      {"a dense MLP beside experts",
       tiny_latent_model({.experts = tiny_experts()}),
       add(layer_name(1, "mlp.up_proj.weight"), {40, 24}),
       {"no place", "layers.1.mlp.up_proj"}},
      {"shared experts of another size",
       tiny_latent_model({.experts = tiny_experts()}),
       add(layer_name(1, "mlp.shared_experts.up_proj.weight"), {10, 24}),
       {"shared_experts.up_proj", "[20, 24]", "[10, 24]"}},
      {"scales of FP8 weights",
       tiny_latent_model({.experts = tiny_experts()}),
       [](TinyModel& model) {
         model.put(layer_name(1, "self_attn.o_proj.weight_scale_inv"), {1, 1}, MatrixF::Ones(1, 1));
         model.tensors.at(layer_name(1, "self_attn.o_proj.weight")).dtype = DType::f8_e4m3;
       },
       {"layers.1.self_attn.o_proj.weight_scale_inv", "FP8", "cast them to bfloat16"}},
  });
}

TEST(Families, MixtureRefusals) {
  const TinyModel mixtral = tiny_mixture_model({.model_type = "mixtral"});
  const TinyModel qwen = tiny_mixture_model({.model_type = "qwen2_moe"});
  expect_refused({
      {"an expert by another family's name",
       mixtral,
       add(layer_name(1, "block_sparse_moe.experts.0.up_proj.weight"), {40, 24}),
       {"no place in a mixtral model", "experts.0.up_proj"}},
      {"an expert's down-projection for its gate",
       mixtral,
       add(layer_name(1, "block_sparse_moe.experts.2.w1.weight"), {24, 40}),
       {"experts.2.w1", "[40, 24]", "[24, 40]"}},
      {"a dense layer",
       mixtral,
       add(layer_name(1, "mlp.up_proj.weight"), {40, 24}),
       {"no place", "layers.1.mlp.up_proj"}},
      {"no gate of the shared expert",
       qwen,
       drop(layer_name(2, "mlp.shared_expert_gate.weight")),
       {"missing", "layers.2.mlp.shared_expert_gate"}},
      {"no shared expert",
       qwen,
       drop(layer_name(0, "mlp.shared_expert.up_proj.weight")),
       {"missing", "layers.0.mlp.shared_expert.up_proj"}},
      {"experts in a layer that has none",
       qwen,
       add(layer_name(1, "mlp.experts.0.up_proj.weight"), {10, 24}),
       {"no place", "layers.1.mlp.experts.0.up_proj"}},
      {"a layer that should have experts",
       qwen,
       [](TinyModel& model) { model.config["mlp_only_layers"] = nlohmann::ordered_json::array(); },
       {"no place", "layers.1.mlp.up_proj"}},
      {"a router of fewer experts",
       qwen,
       add(layer_name(0, "mlp.gate.weight"), {4, 24}),
       {"layers.0.mlp.gate", "[5, 24]", "[4, 24]"}},
  });
}

TEST(Families, AuthorsLayoutRefusals) {
  expect_refused({
      {"a third latent",
       tiny_mlra_model(mlra_samples()[2]),
       add("transformer.h.0.attn.kv_a_layernorm_3.weight", {15}),
       {"no place in a mlra model", "kv_a_layernorm_3"}},
      {"latents by the other name",
       tiny_mlra_model(mlra_samples()[2]),
       add("transformer.h.0.attn.kv_b_proj", {4, 10, 40}),
       {"no place", "transformer.h.0.attn.kv_b_proj"}},
      {"one latent less",
       tiny_mlra_model(),
       drop("transformer.h.1.attn.kv_a_layernorms.3.weight"),
       {"missing", "kv_a_layernorms.3.weight"}},
      {"output-major up-projections",
       tiny_mlra_model(),
       add("transformer.h.1.attn.kv_b_proj", {4, 40, 10}),
       {"transformer.h.1.attn.kv_b_proj", "[4, 10, 40] by config.json", "[4, 40, 10]"}},
      {"a bias of the MLRA authors' latents",
       tiny_mlra_model(),
       add("transformer.h.0.attn.kv_a_proj_with_mqa.bias", {46}),
       {"no place", "kv_a_proj_with_mqa.bias"}},
      {"no bias of the GLA authors' latents",
       tiny_gla_model(),
       drop(layer_name(1, "self_attn.W_ukv_2.bias")),
       {"a gla model needs", "missing", "W_ukv_2.bias"}},
      {"an output bias that the config denies",
       tiny_gla_model(),
       [](TinyModel& model) { model.config["attention_bias"] = false; },
       {"no place", "o_proj.bias"}},
  });
}

TEST(Families, PredictionLayersAreOnlyCounted) {
  TinyModel model = tiny_latent_model({.experts = tiny_experts()});
  const std::size_t before = model.tensors.size();
  model.put("model.layers.3.eh_proj.weight", MatrixF::Ones(3, 7));
  model.put_vector("model.layers.3.enorm.weight", RowVectorF::Ones(5));
  expect_error(ErrorKind::input, {"no place", "model.layers.3.eh_proj.weight"}, [&] { place(model); });
  model.config["num_nextn_predict_layers"] = 1;
  std::vector<PlacedTensor> placed = place(model);
  EXPECT_EQ(placed.size(), before + 2);
  std::erase_if(placed, [](const PlacedTensor& tensor) { return tensor.role != Role::prediction; });
  ASSERT_EQ(placed.size(), 2U);
  EXPECT_EQ(placed[0].name, "model.layers.3.eh_proj.weight");
  EXPECT_EQ(placed[1].layer_idx, 3);
  model.put_vector("model.layers.4.enorm.weight", RowVectorF::Ones(5));
  expect_error(ErrorKind::input, {"no place", "model.layers.4.enorm.weight"}, [&] { place(model); });
}

TEST(Families, LongListsOfStrangersAreCutShort) {
  TinyModel model = tiny_model();
  for (int i = 10; i < 30; ++i) {
    model.put_vector("extra." + std::to_string(i), RowVectorF::Ones(1));
  }
  expect_error(ErrorKind::input, {"extra.10, extra.11", "and 8 more"}, [&] { place(model); });
}

}  // namespace
}  // namespace relatent
