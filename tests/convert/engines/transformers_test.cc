#include "convert/engines/transformers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/products.h"
#include "convert/engines/layout.h"
#include "convert/model/model.h"
#include "formats/error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"
#include "tests/support/written.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;
using testing_support::kFloatNoise;
using testing_support::Random;
using testing_support::relative_error;
using testing_support::TempFolder;

constexpr double kFloatEpsilon = std::numeric_limits<float>::epsilon();

// What transformers hard-codes for its latent norms.
constexpr double kEps = 1e-6;

// The value after a trip through the dtype.
double stored(DType dtype, double value) {
  const auto wide = static_cast<float>(value);
  std::vector<std::byte> bytes(size_of(dtype));
  encode_floats(dtype, {&wide, 1}, bytes);
  float out = 0;
  decode_floats(dtype, bytes, {&out, 1});
  return static_cast<double>(out);
}

bool is_power_of_two(double value) {
  return value > 0 && std::exp2(std::round(std::log2(value))) == value;
}

TEST(NormUndo, NumbersAreExactInTheDtype) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Index rank : {1, 16, 63, 512, 2000}) {
      for (const double mean_square : {0.0, 1e-4, 0.3, 1.0, 7.0, 1e4}) {
        const NormUndo undo = undo_norm(rank, mean_square, kEps, dtype);
        EXPECT_EQ(stored(dtype, undo.beta), undo.beta);
        EXPECT_EQ(stored(dtype, undo.gain), undo.gain);
        EXPECT_TRUE(is_power_of_two(undo.scale)) << undo.scale;
        EXPECT_GT(undo.beta, 0);
        if (mean_square > 0) {
          // Within a factor of two of unit mean square.
          EXPECT_LE(std::abs(std::log2(mean_square * undo.scale * undo.scale)), 1 + 1e-12);
        } else {
          EXPECT_EQ(undo.scale, 1);
        }
        EXPECT_NEAR(undo.correction, 1, 2e-3);
        EXPECT_NEAR(undo.constant, std::sqrt(static_cast<double>(rank + 1)), 0.01 * std::sqrt(rank + 1.0));
      }
    }
  }
}

// The norm of [scale c; beta] with the gain, times the correction, is c again: exact where the mean square is
// as expected, and off by half the surplus over the square of the constant where it is not.
TEST(NormUndo, ReturnsTheLatent) {
  Random random(1);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Index rank : {1, 16, 63, 512}) {
      for (const double mean_square : {0.0, 1e-4, 0.3, 1.0, 7.0, 1e4}) {
        for (const double size : {0.1, 1.0, 30.0}) {
          SCOPED_TRACE(std::to_string(rank) + " " + std::to_string(mean_square) + " " + std::to_string(size));
          const NormUndo undo = undo_norm(rank, mean_square, kEps, dtype);
          RowVectorF c = random.row(rank);
          const double root = std::sqrt(mean_square > 0 ? mean_square : 1.0);
          c *= static_cast<float>(size * root /
                                  (static_cast<double>(c.norm()) / std::sqrt(static_cast<double>(rank))));
          MatrixF latent(1, rank + 1);
          latent << c * static_cast<float>(undo.scale), static_cast<float>(undo.beta);
          RmsNorm norm{RowVectorF::Constant(rank + 1, static_cast<float>(undo.gain)),
                       static_cast<float>(kEps)};
          norm.gain(rank) = 1;
          normalise(norm, latent);
          const MatrixF found = latent.leftCols(rank) * static_cast<float>(undo.correction);
          const double unit = root * root * undo.scale * undo.scale * static_cast<double>(rank);
          const double surplus = std::abs(size * size - 1) * unit / (undo.beta * undo.beta) / 2;
          EXPECT_LE(relative_error(found, c), 1.01 * surplus + 4 * kFloatEpsilon);
          if (size == 1.0) {
            EXPECT_NEAR(static_cast<double>(latent(0, rank)) / undo.constant, 1, 4 * kFloatEpsilon);
          }
        }
      }
    }
  }
}

struct ShapeSample {
  std::string name;
  Index nope_dim = 5;
  bool q_bias = false;
  std::optional<Index> q_rank = {};
  bool other_biases = true;
};

std::vector<ShapeSample> shape_samples() {
  return {{.name = "plain", .other_biases = false},
          {.name = "biases"},
          {.name = "no content", .nope_dim = 0},
          {.name = "query bias", .q_bias = true},
          {.name = "no content, query bias", .nope_dim = 0, .q_bias = true},
          {.name = "low-rank query", .q_rank = 7},
          {.name = "low-rank query, no content", .nope_dim = 0, .q_rank = 7, .other_biases = false}};
}

LatentShape shape_of(const ShapeSample& sample) {
  LatentShape out;
  out.heads = 6;
  out.qk_nope_head_dim = sample.nope_dim;
  out.qk_rope_head_dim = 6;
  out.v_head_dim = 7;
  out.kv_lora_rank = 9;
  out.q_lora_rank = sample.q_rank;
  out.has_q_bias = sample.q_bias;
  return out;
}

// The mean squares are those of the outputs for x.
LatentAttention random_layer(Random& random, const ShapeSample& sample, Index hidden, const MatrixF& x) {
  const LatentShape shape = shape_of(sample);
  LatentAttention out;
  out.heads = shape.heads;
  out.nope_dim = shape.qk_nope_head_dim;
  out.rope_dim = shape.qk_rope_head_dim;
  out.v_dim = shape.v_head_dim;
  // Not what an engine would take by itself.
  out.scale = 0.55F;
  const auto mean_square = [](const MatrixF& m) {
    return static_cast<double>(m.squaredNorm()) / static_cast<double>(m.size());
  };
  if (shape.q_lora_rank) {
    out.q_down = random.linear(*shape.q_lora_rank, hidden, sample.other_biases);
    out.q_down.weight *= 20;
    out.q_mean_square = mean_square(product(out.q_down, x));
  } else {
    out.q_mean_square = mean_square(x);
  }
  out.q = random.linear(out.heads * (out.nope_dim + out.rope_dim), shape.q_lora_rank.value_or(hidden),
                        sample.q_bias);
  if (shape.q_lora_rank) {
    out.q.weight /= 20;
  }
  out.rotary_key = random.linear(out.rope_dim, hidden, sample.other_biases);
  LatentBranch branch;
  branch.down = random.linear(shape.kv_lora_rank, hidden, sample.other_biases);
  branch.down.weight *= 1e-2F;
  branch.down.bias *= 1e-2F;
  branch.mean_square = mean_square(product(branch.down, x));
  branch.up = random.matrix(out.heads * (out.nope_dim + out.v_dim), shape.kv_lora_rank, 30);
  branch.head_count = out.heads;
  out.branches.push_back(std::move(branch));
  out.o = random.linear(hidden, out.heads * out.v_dim, sample.other_biases);
  out.rotary = testing_support::sample_rotary(out.rope_dim, 1.25F);
  return out;
}

Model write_and_open(const LatentAttention& layer, const LatentShape& shape, DType dtype,
                     const TempFolder& folder) {
  return testing_support::write_and_open(*make_transformers_engine(), layer, shape, {.layers = 2}, dtype,
                                         folder);
}

TEST(TransformersEngine, WhatIsWrittenReadsBackAsTheLayer) {
  struct Case {
    DType dtype;
    double tolerance;
  };
  // A dtype of b bits rounds each weight by 2^-b; sums of independent roundings stay near that, and the
  // softmax and the chain of projections multiply it by a few.
  for (const Case& test : {Case{DType::f32, kFloatNoise}, Case{DType::f16, std::exp2(-11) * 8},
                           Case{DType::bf16, std::exp2(-8) * 8}}) {
    for (const ShapeSample& sample : shape_samples()) {
      SCOPED_TRACE(sample.name + " " + std::string(torch_name(test.dtype)));
      const TempFolder folder;
      Random random(3);
      const MatrixF x = testing_support::sample_inputs(random, 30, 24);
      const LatentAttention layer = random_layer(random, sample, 24, x);
      const Model model = write_and_open(layer, shape_of(sample), test.dtype, folder);
      EXPECT_EQ(model.config().model_type, "deepseek_v3");
      EXPECT_EQ(model.config().dtype, test.dtype);
      for (Index i = 0; i < 2; ++i) {
        const Attention back = model.attention(i);
        const RotaryTable table(rotary_of(back), x.rows());
        const MatrixF expected =
            product(layer.o, attention_forward(layer, x, RotaryTable(layer.rotary, x.rows())));
        EXPECT_LE(
            relative_error(product(output_projection(back), attention_forward(back, x, table)), expected),
            test.tolerance);
      }
      EXPECT_EQ(model.config().cache_elements(),
                shape_of(sample).kv_lora_rank + 1 + shape_of(sample).qk_rope_head_dim);
    }
  }
}

TEST(TransformersEngine, NothingReadsTheConstantOfTheCache) {
  const TempFolder folder;
  Random random(4);
  const MatrixF x = testing_support::sample_inputs(random, 10, 24);
  const ShapeSample sample{.name = ""};
  const LatentAttention layer = random_layer(random, sample, 24, x);
  const auto back =
      std::get<LatentAttention>(write_and_open(layer, shape_of(sample), DType::f32, folder).attention(0));
  ASSERT_EQ(back.total_rank(), 10);
  const LatentBranch& branch = back.branches[0];
  EXPECT_TRUE(branch.down.weight.row(9).isZero(0));
  EXPECT_GT(branch.down.bias(9), 1e4F);
  EXPECT_EQ(branch.norm.gain(9), 0);
  EXPECT_TRUE(branch.up.col(9).isZero(0));
}

TEST(TransformersEngine, ShapesOfTheTensors) {
  const auto engine = make_transformers_engine();
  EXPECT_EQ(engine->name(), "transformers");
  const Json source_config = testing_support::tiny_config({.layers = 5});
  const ModelConfig source = parse_config(source_config, "config.json");
  const auto shapes = [&](const ShapeSample& sample) {
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
  Shapes expected = {{"q_proj.weight", {66, 24}},
                     {"kv_a_proj_with_mqa.weight", {16, 24}},
                     {"kv_a_proj_with_mqa.bias", {16}},
                     {"kv_a_layernorm.weight", {10}},
                     {"kv_b_proj.weight", {72, 10}},
                     {"o_proj.weight", {24, 42}},
                     {"o_proj.bias", {24}}};
  EXPECT_EQ(shapes({.name = ""}), expected);
  expected.erase("q_proj.weight");
  // A query bias needs a latent to ride on: the input itself and the constant.
  expected["q_a_proj.weight"] = {25, 24};
  expected["q_a_proj.bias"] = {25};
  expected["q_a_layernorm.weight"] = {25};
  expected["q_b_proj.weight"] = {66, 25};
  EXPECT_EQ(shapes({.name = "", .q_bias = true}), expected);
  expected["q_a_proj.weight"] = {8, 24};
  expected["q_a_proj.bias"] = {8};
  expected["q_a_layernorm.weight"] = {8};
  expected["q_b_proj.weight"] = {66, 8};
  EXPECT_EQ(shapes({.name = "", .q_bias = true, .q_rank = 7}), expected);
  EXPECT_EQ(
      engine->written_config(source_config, source, shape_of({.name = ""}), DType::bf16).cache_elements(),
      9 + 1 + 6);
}

TEST(TransformersEngine, ConfigIsWhatDeepseekV3Needs) {
  const auto engine = make_transformers_engine();
  Json source_config = testing_support::tiny_config({.tied = true});
  source_config["pad_token_id"] = nullptr;
  source_config["initializer_range"] = 1;
  const ModelConfig source = parse_config(source_config, "config.json");
  const Rotary rotary = testing_support::sample_rotary(6, 1.25F);
  const auto make = [&](const ShapeSample& sample, DType dtype) {
    // What is on disk is text.
    return Json::parse(engine->config(source_config, source, shape_of(sample), rotary, dtype).dump());
  };
  const Json config = make({.name = ""}, DType::bf16);
  const Json expected = Json::parse(R"({
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": true,
    "dtype": "bfloat16", "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 24, "intermediate_size": 40,
    "kv_lora_rank": 10, "q_lora_rank": null, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 7,
    "head_dim": 6, "qk_head_dim": 11, "max_position_embeddings": 128, "num_attention_heads": 6,
    "num_key_value_heads": 6, "num_hidden_layers": 3, "rms_norm_eps": 1e-5, "rope_interleave": true,
    "tie_word_embeddings": true, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": null})");
  for (const auto& [key, value] : expected.items()) {
    ASSERT_TRUE(config.contains(key)) << key;
    EXPECT_EQ(config[key], value) << key;
  }
  // transformers checks types: a float must not look like a whole number.
  for (const char* key :
       {"attention_dropout", "initializer_range", "rms_norm_eps", "routed_scaling_factor"}) {
    EXPECT_TRUE(config.at(key).is_number_float()) << key;
  }
  for (const char* key : {"rope_theta", "factor", "attention_factor"}) {
    EXPECT_TRUE(config.at("rope_parameters").at(key).is_number_float()) << key;
  }
  for (const char* key : {"n_group", "topk_group", "n_routed_experts", "n_shared_experts",
                          "num_experts_per_tok", "moe_intermediate_size", "moe_layer_freq"}) {
    EXPECT_TRUE(config.at(key).is_number_integer()) << key;
  }
  EXPECT_EQ(make({.name = "", .q_bias = true}, DType::f16)["q_lora_rank"], 25);
  EXPECT_EQ(make({.name = "", .q_rank = 7}, DType::f32)["q_lora_rank"], 8);
  EXPECT_EQ(make({.name = ""}, DType::f16)["dtype"], "float16");

  // And it says the same to us.
  const ModelConfig back = parse_config(config, "config.json");
  ASSERT_EQ(back.rotary.inv_freq.size(), 3U);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_NEAR(static_cast<double>(back.rotary.inv_freq[i] / rotary.inv_freq[i]), 1, kFloatEpsilon);
  }
  EXPECT_EQ(back.rotary.attention_factor, 1.25F);
  EXPECT_EQ(back.latent->kv_lora_rank, 10);
  EXPECT_FLOAT_EQ(back.attention.front().scale, 1 / std::sqrt(11.0F));
}

TEST(Engine, FollowsTheSource) {
  ModelConfig source;
  EXPECT_EQ(make_engine("transformers", "mla", &source)->name(), "transformers");
  source.experts = testing_support::tiny_experts();
  EXPECT_EQ(make_engine("transformers", "mla", &source)->name(), "relatent");
  EXPECT_EQ(make_engine("transformers", "gla", &source)->name(), "relatent");
  // One that was asked for by name says why rather than stand aside.
  for (const char* name : {"deepseek", "gguf"}) {
    const std::unique_ptr<Engine> engine = make_engine(name, "mla", &source);
    ASSERT_NE(engine, nullptr);
    EXPECT_EQ(engine->name(), name);
    EXPECT_NE(engine->why_not_source(source).find("mixture of experts"), std::string::npos);
  }
  EXPECT_EQ(make_engine("relatent", "mla")->why_not_source(source), "");
  EXPECT_EQ(make_engine("deepseek", "gla", &source), nullptr);
}

TEST(Engine, IsFoundByName) {
  ASSERT_NE(make_engine("transformers", "mla"), nullptr);
  EXPECT_EQ(make_engine("transformers", "mla")->name(), "transformers");
  ASSERT_NE(make_engine("deepseek", "mla"), nullptr);
  EXPECT_EQ(make_engine("deepseek", "mla")->name(), "deepseek");
  for (const char* form : {"mlra", "gla"}) {
    ASSERT_NE(make_engine("mlra", form), nullptr);
    EXPECT_EQ(make_engine("mlra", form)->name(), "mlra");
  }
  ASSERT_NE(make_engine("gla", "gla"), nullptr);
  EXPECT_EQ(make_engine("gla", "gla")->name(), "gla");
  for (const char* form : {"mla", "tpla"}) {
    EXPECT_EQ(make_engine("mlra", form), nullptr);
    EXPECT_EQ(make_engine("gla", form), nullptr);
  }
  EXPECT_EQ(make_engine("gla", "mlra"), nullptr);
  EXPECT_EQ(make_engine("deepseek", "gla"), nullptr);
  EXPECT_EQ(make_engine("llama.cpp", "mla"), nullptr);
  EXPECT_EQ(make_engine("", "mla"), nullptr);
  for (const char* form : {"mla", "gla", "tpla", "mlra"}) {
    ASSERT_NE(make_engine("relatent", form), nullptr);
    EXPECT_EQ(make_engine("relatent", form)->name(), "relatent");
  }
  EXPECT_EQ(join_words(engine_names(), "or"), "transformers, relatent, deepseek, gguf, mlra or gla");
  EXPECT_EQ(join_words(engine_names([](const EngineTraits& t) { return t.normed_latent; })),
            "deepseek, gguf and mlra");
}

}  // namespace
}  // namespace relatent
