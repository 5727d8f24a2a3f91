#include "convert/engines/gla.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "convert/compute/cpu/products.h"
#include "tests/support/author_layouts.h"
#include "tests/support/expect_error.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;
using testing_support::expect_error;
using testing_support::gla_samples;
using testing_support::GlaSample;
using testing_support::kFloatNoise;
using testing_support::output_by_the_book;
using testing_support::output_of;
using testing_support::plain_rotary;
using testing_support::Random;
using testing_support::random_layer;
using testing_support::relative_error;
using testing_support::sample_inputs;
using testing_support::shape_of;
using testing_support::TempFolder;
using testing_support::tiny_config;
using testing_support::tiny_gla_model;
using testing_support::TinyModel;
using testing_support::TinyOptions;

TinyOptions body_of(const GlaSample& sample) {
  return {.hidden = sample.hidden, .layers = 2, .heads = 6};
}

ModelConfig source_of(const GlaSample& sample) {
  return parse_config(tiny_config(body_of(sample)), "config.json");
}

Model write_and_open(const LatentAttention& layer, const GlaSample& sample, DType dtype,
                     const TempFolder& folder) {
  return testing_support::write_and_open_authors(*make_gla_engine(), layer, shape_of(sample), body_of(sample),
                                                 dtype, folder);
}

TEST(GlaEngine, WhatIsWrittenComputesTheSame) {
  for (const GlaSample& sample : gla_samples()) {
    SCOPED_TRACE(sample.name);
    const TempFolder folder;
    Random random(3);
    const LatentAttention layer = random_layer(random, sample);
    const MatrixF x = sample_inputs(random, 30, sample.hidden);
    const Model model = write_and_open(layer, sample, DType::f32, folder);
    EXPECT_EQ(model.config().family->name, "gla");
    EXPECT_EQ(model.config().cache_elements(), 4 * 8 + 6);
    for (Index i = 0; i < 2; ++i) {
      EXPECT_LE(relative_error(output_of(model.attention(i), x), output_by_the_book(layer, x)), kFloatNoise);
    }
  }
}

// Mean squares far from 1 are known to a conversion; the norm does nothing all the same.
TEST(GlaEngine, SizesOfTheLatentsDoNotMatter) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const GlaSample sample{.rank = 11, .q_rank = 9, .bias = true};
    const TempFolder folder;
    Random random(4);
    LatentAttention layer = random_layer(random, sample);
    const MatrixF x = sample_inputs(random, 30, sample.hidden);
    const MatrixD expected = output_by_the_book(layer, x);
    const auto stretch = [&](Linear& down, MatrixF& up, float factor) {
      down.weight *= factor;
      down.bias *= factor;
      up /= factor;
      return static_cast<double>(product(down, x).squaredNorm()) / static_cast<double>(x.rows() * down.out());
    };
    layer.q_mean_square = stretch(layer.q_down, layer.q.weight, 900.0F);
    layer.branches[0].mean_square = stretch(layer.branches[0].down, layer.branches[0].up, 3000.0F);
    layer.branches[1].mean_square = stretch(layer.branches[1].down, layer.branches[1].up, 0.001F);
    const Model model = write_and_open(layer, sample, dtype, folder);
    EXPECT_LE(relative_error(output_of(model.attention(1), x), expected),
              dtype == DType::f32 ? kFloatNoise : std::exp2(-8) * 8);
  }
}

TEST(GlaEngine, RoundsToTheDtype) {
  for (const auto& [dtype, bits] : {std::pair{DType::f16, 11}, std::pair{DType::bf16, 8}}) {
    for (const GlaSample& sample : gla_samples()) {
      SCOPED_TRACE(sample.name + " " + std::string(torch_name(dtype)));
      const TempFolder folder;
      Random random(4);
      const LatentAttention layer = random_layer(random, sample);
      const MatrixF x = sample_inputs(random, 30, sample.hidden);
      const Model model = write_and_open(layer, sample, dtype, folder);
      EXPECT_EQ(model.config().dtype, dtype);
      const double error = relative_error(output_of(model.attention(0), x), output_by_the_book(layer, x));
      EXPECT_LE(error, std::exp2(-bits) * 8);
      EXPECT_GT(error, std::exp2(-bits) / 8);
    }
  }
}

// d = 8: latents of 16 and a query latent of 64, whatever is used of them.
TEST(GlaEngine, NamesAndShapesAreTheAuthors) {
  using Listed = std::vector<std::pair<std::string, std::vector<std::int64_t>>>;
  const Listed expected = {{"model.layers.3.self_attn.W_dQ.weight", {64, 24}},
                           {"model.layers.3.self_attn.W_dQ.bias", {64}},
                           {"model.layers.3.self_attn.q_norm.weight", {64}},
                           {"model.layers.3.self_attn.W_uQ_rope.weight", {84, 64}},
                           {"model.layers.3.self_attn.W_uQ_rope.bias", {84}},
                           {"model.layers.3.self_attn.W_dKV.weight", {38, 24}},
                           {"model.layers.3.self_attn.W_dKV.bias", {38}},
                           {"model.layers.3.self_attn.kv_norm_1.weight", {16}},
                           {"model.layers.3.self_attn.kv_norm_2.weight", {16}},
                           {"model.layers.3.self_attn.W_ukv_1.weight", {48, 16}},
                           {"model.layers.3.self_attn.W_ukv_1.bias", {48}},
                           {"model.layers.3.self_attn.W_ukv_2.weight", {48, 16}},
                           {"model.layers.3.self_attn.W_ukv_2.bias", {48}},
                           {"model.layers.3.self_attn.o_proj.weight", {24, 48}},
                           {"model.layers.3.self_attn.o_proj.bias", {24}}};
  for (GlaSample sample : gla_samples()) {
    SCOPED_TRACE(sample.name);
    sample.hidden = 24;
    Listed found;
    TinyOptions body = body_of(sample);
    body.layers = 4;
    const Json config = tiny_config(body);
    for (const ExpectedTensor& spec :
         testing_support::attention_tensors(*make_gla_engine(), config, parse_config(config, "config.json"),
                                            shape_of(sample), 3, DType::f16)) {
      found.emplace_back(spec.name, spec.shape);
    }
    EXPECT_EQ(found, expected);
  }
}

TEST(GlaEngine, ConfigHasTheAuthorsKeys) {
  const Json source = tiny_config(body_of({}));
  const Json found = Json::parse(
      make_gla_engine()
          ->config(source, source_of({}), shape_of(GlaSample{}), plain_rotary(6, 500), DType::bf16)
          .dump());
  const Json expected = Json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 0, "eos_token_id": [1, 2],
    "attention_bias": true, "attention_dropout": 0.0, "dtype": "bfloat16", "head_dim": 8,
    "hidden_act": "silu", "hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 128,
    "mlp_bias": false, "num_attention_heads": 6, "num_hidden_layers": 2, "num_key_value_heads": 6,
    "qk_rope_dim": 6, "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 500.0,
    "tie_word_embeddings": false, "use_cache": true, "vocab_size": 50})");
  EXPECT_EQ(found, expected);
}

TEST(GlaEngine, SaysWhatItCannotHold) {
  const auto engine = make_gla_engine();
  const auto why = [&](Index branches, Index rank, Index heads) {
    LatentShape shape = shape_of(GlaSample{});
    shape.heads = heads;
    shape.branches.clear();
    lay_out(partition_of("gla", branches).value(),
            std::vector<GroupSizes>(static_cast<std::size_t>(branches), {0, rank}), shape);
    return engine->why_not(source_of({}), shape);
  };
  EXPECT_EQ(why(2, 15, 6), "");
  EXPECT_EQ(why(2, 1, 6), "");
  EXPECT_NE(why(2, 16, 6).find("--rank is at most 30"), std::string::npos) << why(2, 16, 6);
  EXPECT_NE(why(3, 8, 6).find("--branches 2"), std::string::npos);
  EXPECT_NE(why(4, 8, 8).find("--branches 2"), std::string::npos);
  EXPECT_NE(why(2, 8, 5).find("half of the heads"), std::string::npos);
}

TEST(GlaEngine, SizesFollowTheHeadSize) {
  const auto engine = make_gla_engine();
  EXPECT_EQ(engine->default_rank(source_of({})), 30);
  EXPECT_EQ(engine->query_rank(source_of({})), std::nullopt);
  EXPECT_EQ(engine->query_rank(source_of({.hidden = 63})), std::nullopt);
  EXPECT_EQ(engine->query_rank(source_of({.hidden = 64})), 63);
  const EngineTraits traits = engine->traits();
  EXPECT_FALSE(traits.any_frequencies);
  EXPECT_FALSE(traits.normed_latent);
  EXPECT_FALSE(traits.latent_source);
  EXPECT_FALSE(traits.fixed_base.has_value());
}

// The authors' module may have been trained to one; there is no place for it here.
TEST(GlaEngine, BiasOfAnUpProjectionIsRefused) {
  const TempFolder folder;
  TinyModel model = tiny_gla_model();
  const std::string name = "model.layers.1.self_attn.W_ukv_2.bias";
  for (const std::string part : {"1", "2"}) {
    for (const std::string layer : {"0", "1"}) {
      std::string bias = "model.layers.";
      bias += layer + ".self_attn.W_ukv_";
      bias += part + ".bias";
      model.put_vector(bias, RowVectorF::Zero(48));
    }
  }
  model.write(folder / "zero");
  EXPECT_NO_THROW(Model::open(folder / "zero").attention(1));
  RowVectorF bias = RowVectorF::Zero(48);
  bias(40) = 1;
  model.put_vector(name, bias);
  model.write(folder / "one");
  EXPECT_NO_THROW(Model::open(folder / "one").attention(0));
  expect_error(ErrorKind::input, {name, "bias", "zeros"}, [&] { Model::open(folder / "one").attention(1); });
}

}  // namespace
}  // namespace relatent
