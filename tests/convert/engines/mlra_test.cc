#include "convert/engines/mlra.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "tests/support/author_layouts.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;
using testing_support::kFloatNoise;
using testing_support::mlra_samples;
using testing_support::MlraSample;
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
using testing_support::TinyOptions;

TinyOptions body_of(const MlraSample& sample) {
  return {.hidden = sample.hidden, .layers = 2, .heads = 8, .tied = true};
}

ModelConfig source_of(const MlraSample& sample) {
  return parse_config(tiny_config(body_of(sample)), "config.json");
}

Model write_and_open(const LatentAttention& layer, const MlraSample& sample, DType dtype,
                     const TempFolder& folder) {
  return testing_support::write_and_open_authors(*make_mlra_engine(), layer, shape_of(sample),
                                                 body_of(sample), dtype, folder);
}

TEST(MlraEngine, WhatIsWrittenComputesTheSame) {
  for (const MlraSample& sample : mlra_samples()) {
    SCOPED_TRACE(sample.model());
    const TempFolder folder;
    Random random(3);
    const LatentAttention layer = random_layer(random, sample);
    const MatrixF x = sample_inputs(random, 30, sample.hidden);
    const Model model = write_and_open(layer, sample, DType::f32, folder);
    EXPECT_EQ(model.config().family->name, "mlra");
    EXPECT_EQ(model.config().cache_elements(), layer.total_rank() + layer.rope_dim);
    EXPECT_TRUE(model.config().tie_word_embeddings);
    for (Index i = 0; i < 2; ++i) {
      EXPECT_LE(relative_error(output_of(model.attention(i), x), output_by_the_book(layer, x)), kFloatNoise);
    }
    const auto back = std::get<LatentAttention>(model.attention(1));
    ASSERT_EQ(back.branches.size(), layer.branches.size());
    for (std::size_t b = 0; b < layer.branches.size(); ++b) {
      EXPECT_TRUE(back.branches[b].down.weight == layer.branches[b].down.weight);
      EXPECT_TRUE(back.branches[b].norm.gain == layer.branches[b].norm.gain);
      EXPECT_EQ(back.branches[b].norm.eps, 1e-6F);
      EXPECT_EQ(back.branches[b].first_head, layer.branches[b].first_head);
      EXPECT_EQ(back.branches[b].head_count, layer.branches[b].head_count);
      EXPECT_FALSE(back.branches[b].shared);
    }
    EXPECT_EQ(back.rotary.inv_freq.size(), 3U);
  }
}

TEST(MlraEngine, RoundsToTheDtype) {
  for (const auto& [dtype, bits] : {std::pair{DType::f16, 11}, std::pair{DType::bf16, 8}}) {
    for (const MlraSample& sample : mlra_samples()) {
      SCOPED_TRACE(sample.model() + " " + std::string(torch_name(dtype)));
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

// The factors of the authors' code, from their formulas: √(hidden / rank of one latent) on a normalised
// latent, √(hidden / query rank) on the query's, 1/√(branches) on outputs of MLRA, (n + p)^-1/2 on scores.
TEST(MlraEngine, StoredNumbersLackTheFactorsOfTheCode) {
  for (const MlraSample& sample : mlra_samples()) {
    SCOPED_TRACE(sample.model());
    const TempFolder folder;
    Random random(5);
    const LatentAttention layer = random_layer(random, sample);
    const Model model = write_and_open(layer, sample, DType::f32, folder);
    const TensorSource& stored = model.checkpoint();
    const std::string attn = "transformer.h.1.attn.";
    const auto rank = static_cast<double>(layer.branches[0].down.out());
    const double latent_scale = std::sqrt(24 / rank);
    const double value_scale =
        sample.form == "mlra" ? 1 / std::sqrt(static_cast<double>(sample.branches)) : 1;
    EXPECT_LE(relative_error(
                  stored.read_matrix(attn + "q_b_proj.weight"),
                  MatrixD(layer.q.weight.cast<double>() * 0.4 * std::sqrt(11.0) / std::sqrt(24.0 / 17.0))),
              1e-6);
    const bool pairs = sample.model() == "gla_2";
    const MatrixF all = pairs ? MatrixF() : stored.read_matrix(attn + "kv_b_proj");
    for (std::size_t b = 0; b < layer.branches.size(); ++b) {
      const LatentBranch& branch = layer.branches[b];
      const auto size = branch.down.out();
      const MatrixF up = pairs ? stored.read_matrix(attn + "kv_b_proj_" + std::to_string(b + 1) + ".weight")
                               : MatrixF(all.middleRows(static_cast<Index>(b) * size, size).transpose());
      ASSERT_EQ(up.rows(), branch.up.rows());
      for (Index row = 0; row < up.rows(); ++row) {
        const bool value = row % 10 >= 5;
        EXPECT_LE(relative_error(
                      MatrixF(up.row(row) * static_cast<float>(latent_scale * (value ? value_scale : 1))),
                      MatrixF(branch.up.row(row))),
                  1e-6);
      }
    }
    const MatrixF kv_a = stored.read_matrix(attn + "kv_a_proj_with_mqa.weight");
    EXPECT_TRUE(kv_a.bottomRows(6) == layer.rotary_key.weight);
    EXPECT_TRUE(stored.read_matrix(attn + "c_proj.weight") == layer.o.weight);
  }
}

using Listed = std::vector<std::pair<std::string, std::vector<std::int64_t>>>;

Listed listed(const MlraSample& sample) {
  Listed out;
  TinyOptions body = body_of(sample);
  body.layers = 4;
  const Json config = tiny_config(body);
  for (const ExpectedTensor& spec :
       testing_support::attention_tensors(*make_mlra_engine(), config, parse_config(config, "config.json"),
                                          shape_of(sample), 3, DType::bf16)) {
    out.emplace_back(spec.name, spec.shape);
  }
  return out;
}

// Groups of mlra_2 hold 13 coordinates, 3 shared and 5 of each part; all have 2 for the norm.
TEST(MlraEngine, NamesAndShapesAreTheAuthors) {
  const auto samples = mlra_samples();
  const Listed mlra_2 = {{"transformer.h.3.attn.q_a_proj.weight", {17, 24}},
                         {"transformer.h.3.attn.q_a_layernorm.weight", {17}},
                         {"transformer.h.3.attn.q_b_proj.weight", {88, 17}},
                         {"transformer.h.3.attn.kv_a_proj_with_mqa.weight", {46, 24}},
                         {"transformer.h.3.attn.kv_a_layernorms.0.weight", {10}},
                         {"transformer.h.3.attn.kv_a_layernorms.1.weight", {10}},
                         {"transformer.h.3.attn.kv_a_layernorms.2.weight", {10}},
                         {"transformer.h.3.attn.kv_a_layernorms.3.weight", {10}},
                         {"transformer.h.3.attn.kv_b_proj", {4, 10, 40}},
                         {"transformer.h.3.attn.c_proj.weight", {24, 40}}};
  EXPECT_EQ(listed(samples[0]), mlra_2);
  const Listed mlra_4 = {{"transformer.h.3.attn.q_a_proj.weight", {17, 24}},
                         {"transformer.h.3.attn.q_a_layernorm.weight", {17}},
                         {"transformer.h.3.attn.q_b_proj.weight", {88, 17}},
                         {"transformer.h.3.attn.kv_a_proj_with_mqa.weight", {38, 24}},
                         {"transformer.h.3.attn.kv_a_layernorms.0.weight", {8}},
                         {"transformer.h.3.attn.kv_a_layernorms.1.weight", {8}},
                         {"transformer.h.3.attn.kv_a_layernorms.2.weight", {8}},
                         {"transformer.h.3.attn.kv_a_layernorms.3.weight", {8}},
                         {"transformer.h.3.attn.kv_b_proj", {4, 8, 80}},
                         {"transformer.h.3.attn.c_proj.weight", {24, 40}}};
  EXPECT_EQ(listed(samples[1]), mlra_4);
  const Listed gla_2 = {{"transformer.h.3.attn.q_a_proj.weight", {17, 24}},
                        {"transformer.h.3.attn.q_a_layernorm.weight", {17}},
                        {"transformer.h.3.attn.q_b_proj.weight", {88, 17}},
                        {"transformer.h.3.attn.kv_a_proj_with_mqa.weight", {36, 24}},
                        {"transformer.h.3.attn.kv_a_layernorm_1.weight", {15}},
                        {"transformer.h.3.attn.kv_a_layernorm_2.weight", {15}},
                        {"transformer.h.3.attn.kv_b_proj_1.weight", {40, 15}},
                        {"transformer.h.3.attn.kv_b_proj_2.weight", {40, 15}},
                        {"transformer.h.3.attn.c_proj.weight", {24, 40}}};
  EXPECT_EQ(listed(samples[2]), gla_2);
  const Listed gla_4 = {{"transformer.h.3.attn.q_a_proj.weight", {17, 24}},
                        {"transformer.h.3.attn.q_a_layernorm.weight", {17}},
                        {"transformer.h.3.attn.q_b_proj.weight", {88, 17}},
                        {"transformer.h.3.attn.kv_a_proj_with_mqa.weight", {66, 24}},
                        {"transformer.h.3.attn.kv_a_layernorms.0.weight", {15}},
                        {"transformer.h.3.attn.kv_a_layernorms.1.weight", {15}},
                        {"transformer.h.3.attn.kv_a_layernorms.2.weight", {15}},
                        {"transformer.h.3.attn.kv_a_layernorms.3.weight", {15}},
                        {"transformer.h.3.attn.kv_b_proj", {4, 15, 20}},
                        {"transformer.h.3.attn.c_proj.weight", {24, 40}}};
  EXPECT_EQ(listed(samples[3]), gla_4);
}

TEST(MlraEngine, NamesOfWhatSurroundsAttention) {
  const MlraSample sample;
  TinyOptions body = body_of(sample);
  body.layers = 12;
  const Json config = tiny_config(body);
  const TensorNames names([&] {
    std::vector<PlacedTensor> out;
    for (const ExpectedTensor& tensor : expected_tensors(make_mlra_engine()->written_config(
             config, parse_config(config, "config.json"), shape_of(sample), DType::bf16))) {
      out.push_back(tensor);
    }
    return out;
  }());
  EXPECT_EQ(names.at(Role::embed_tokens, {}), "transformer.wte.weight");
  EXPECT_EQ(names.at(Role::final_norm, {}), "layernorm.weight");
  EXPECT_EQ(names.at(Role::input_norm, 2), "transformer.h.2.input_layernorm.weight");
  EXPECT_EQ(names.at(Role::post_attention_norm, 2), "transformer.h.2.post_attention_layernorm.weight");
  EXPECT_EQ(names.at(Role::gate_weight, 11), "transformer.h.11.mlp.c_fc1.weight");
  EXPECT_EQ(names.at(Role::up_weight, 11), "transformer.h.11.mlp.c_fc2.weight");
  EXPECT_EQ(names.at(Role::down_weight, 0), "transformer.h.0.mlp.c_proj.weight");
}

Json config_of(const MlraSample& sample, const Rotary& rotary) {
  const Json source = tiny_config(body_of(sample));
  return Json::parse(
      make_mlra_engine()->config(source, source_of(sample), shape_of(sample), rotary, DType::bf16).dump());
}

TEST(MlraEngine, ConfigHasTheAuthorsKeys) {
  const Json expected = Json::parse(R"({
    "architectures": ["GPT"], "model_type": "gpt2", "mlra_model": "mlra_2", "bos_token_id": 0,
    "eos_token_id": [1, 2], "bias": false, "block_size": 128, "dropout": 0.0, "dtype": "bfloat16",
    "intermediate_size": 40, "kv_lora_rank": 40, "n_embd": 24, "n_head": 8, "n_layer": 2,
    "q_lora_rank": 17, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "tie_word_embeddings": true,
    "vocab_size": 50})");
  EXPECT_EQ(config_of({}, plain_rotary(6, 10000)), expected);
  for (const MlraSample& sample : mlra_samples()) {
    EXPECT_EQ(config_of(sample, plain_rotary(6, 10000))["mlra_model"], sample.model());
  }
  EXPECT_THROW(config_of({}, plain_rotary(6, 500)), std::logic_error);
}

TEST(MlraEngine, SaysWhatItCannotHold) {
  const auto engine = make_mlra_engine();
  const auto why = [&](const std::string& form, Index branches, const GroupSizes& group, Index heads = 8) {
    const Partition partition = partition_of(form, branches).value();
    LatentShape shape;
    shape.form = form;
    shape.heads = heads;
    lay_out(partition, std::vector<GroupSizes>(static_cast<std::size_t>(partition.groups), group), shape);
    return engine->why_not(source_of({}), shape);
  };
  for (const MlraSample& sample : mlra_samples()) {
    EXPECT_EQ(engine->why_not(source_of(sample), shape_of(sample)), "");
  }
  EXPECT_NE(why("gla", 3, {0, 8}).find("2 or 4 latents"), std::string::npos);
  EXPECT_NE(why("gla", 8, {0, 8}).find("2 or 4 latents"), std::string::npos);
  EXPECT_NE(why("mlra", 4, {3, 14}).find("of one size"), std::string::npos);
  EXPECT_NE(why("mlra", 2, {3, 14}).find("of one size"), std::string::npos);
  EXPECT_NE(why("gla", 4, {0, 8}, 6).find("divide evenly"), std::string::npos);
  EXPECT_NE(why("mlra", 2, {3, 13}, 5).find("divide evenly"), std::string::npos);
}

TEST(MlraEngine, RefusesToWriteWhatHasNoPlace) {
  const std::vector<std::function<void(LatentAttention&)>> spoils = {
      [](LatentAttention& a) { a.q.bias = RowVectorF::Zero(88); },
      [](LatentAttention& a) { a.o.bias = RowVectorF::Zero(24); },
      [](LatentAttention& a) { a.rotary_key.bias = RowVectorF::Zero(6); },
      [](LatentAttention& a) { a.q_down.bias = RowVectorF::Zero(17); },
      [](LatentAttention& a) { a.q_norm = {}; },
      [](LatentAttention& a) { a.branches[1].down.bias = RowVectorF::Zero(10); },
      [](LatentAttention& a) { a.branches[2].norm = {}; },
      [](LatentAttention& a) { a.branches[3].shared = 0; },
      [](LatentAttention& a) { a.branches[3].down.weight.conservativeResize(9, 24); },
  };
  for (std::size_t i = 0; i < spoils.size(); ++i) {
    const TempFolder folder;
    Random random(6);
    LatentAttention layer = random_layer(random, MlraSample{});
    spoils[i](layer);
    EXPECT_THROW(write_and_open(layer, {}, DType::f32, folder), std::logic_error) << i;
  }
}

TEST(MlraEngine, Traits) {
  const EngineTraits traits = make_mlra_engine()->traits();
  EXPECT_FALSE(traits.any_frequencies);
  EXPECT_TRUE(traits.normed_latent);
  EXPECT_TRUE(traits.must_tie);
  EXPECT_TRUE(traits.normed_query);
  EXPECT_FALSE(traits.latent_source);
  EXPECT_EQ(traits.fixed_base, 10000);
  EXPECT_EQ(traits.norm_eps, 1e-6);
  EXPECT_EQ(make_mlra_engine()->default_rank(source_of({})), std::nullopt);
  EXPECT_EQ(make_mlra_engine()->query_rank(source_of({})), std::nullopt);
}

}  // namespace
}  // namespace relatent
