#include "convert/model/model.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <variant>

#include "examples_path.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::layer_name;
using testing_support::TempFolder;
using testing_support::tiny_latent_model;
using testing_support::tiny_model;
using testing_support::TinyModel;

// The values of a tensor as they went to the disk.
MatrixF stored(const TinyModel& model, const std::string& name) {
  const TinyModel::Tensor& tensor = model.tensors.at(name);
  const Index rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1;
  MatrixF out(rows, tensor.shape.back());
  std::vector<std::byte> bytes(tensor.values.size() * size_of(tensor.dtype));
  encode_floats(tensor.dtype, tensor.values, bytes);
  decode_floats(tensor.dtype, bytes, {out.data(), tensor.values.size()});
  return out;
}

Model open(const TinyModel& model, const TempFolder& folder) {
  model.write(folder.path());
  return Model::open(folder.path());
}

TEST(Model, FusedProjectionsAreReadApart) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const TempFolder fused_folder;
    const TempFolder folder;
    const testing_support::TinyOptions options{.model_type = "mistral", .dtype = dtype};
    const Model fused = open(testing_support::tiny_phi3_model(1, options), fused_folder);
    const Model plain = open(tiny_model(options), folder);
    EXPECT_EQ(fused.tensors().size(), plain.tensors().size());
    for (Index i = 0; i < 3; ++i) {
      const Layer a = fused.layer(i);
      const Layer b = plain.layer(i);
      const auto& x = std::get<GqaAttention>(a.attention);
      const auto& y = std::get<GqaAttention>(b.attention);
      EXPECT_TRUE(x.q.weight == y.q.weight);
      EXPECT_TRUE(x.k.weight == y.k.weight);
      EXPECT_TRUE(x.v.weight == y.v.weight);
      EXPECT_EQ(x.rotary.inv_freq, y.rotary.inv_freq);
      EXPECT_TRUE(a.mlp.gate.weight == b.mlp.gate.weight);
      EXPECT_TRUE(a.mlp.up.weight == b.mlp.up.weight);
      EXPECT_TRUE(fused.scores(i).k.weight == y.k.weight);
      EXPECT_TRUE(fused.keys_and_values(i).v.weight == y.v.weight);
    }
  }
}

TEST(Model, HeadsThatRotateInPartAreHalvesOfTheWholeHead) {
  const TempFolder folder;
  TinyModel tiny = testing_support::tiny_phi3_model(0.5);
  tiny.config["rope_parameters"] = {{"rope_type", "longrope"},
                                    {"rope_theta", 100.0},
                                    {"attention_factor", 2.0},
                                    {"short_factor", {1, 2}},
                                    {"long_factor", {1, 2}}};
  const Model model = open(tiny, folder);
  const GqaAttention found = std::get<GqaAttention>(model.attention(1));
  const MatrixF whole = stored(tiny, layer_name(1, "self_attn.qkv_proj.weight"));
  EXPECT_EQ(found.rotary.rotating_pairs(), 2U);
  // Rows (0, 2) and (1, 3) rotate, 4 to 7 do not, and are not multiplied by the attention factor.
  const std::array<Index, 8> from = {0, 1, 4, 5, 2, 3, 6, 7};
  for (Index row = 0; row < 48; ++row) {
    const Index at = from[static_cast<std::size_t>(row % 8)];
    const float factor = at < 4 ? 1.0F : 0.5F;
    EXPECT_TRUE(found.q.weight.row(row) == whole.row(row / 8 * 8 + at) * factor) << row;
    if (row < 16) {
      EXPECT_TRUE(found.k.weight.row(row) == whole.row(48 + row / 8 * 8 + at) * factor) << row;
    }
  }
  EXPECT_TRUE(found.v.weight == whole.bottomRows(16));
}

TEST(Model, TwoListsOfFrequenciesNeedAContext) {
  const TempFolder folder;
  TinyModel tiny = testing_support::tiny_phi3_model(1);
  tiny.config["original_max_position_embeddings"] = 32;
  tiny.config["rope_scaling"] = {
      {"type", "longrope"}, {"short_factor", {1, 1, 1, 1}}, {"long_factor", {2, 2, 2, 2}}};
  tiny.write(folder.path());
  expect_error(ErrorKind::input, {"longrope", "--context"}, [&] { Model::open(folder.path()); });
  EXPECT_EQ(Model::open(folder.path(), 32).config().rotary.inv_freq.front(), 1.0F);
  EXPECT_EQ(Model::open(folder.path(), 33).config().rotary.inv_freq.front(), 0.5F);
}

TEST(Model, LayersAreWhatTheFileHolds) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    const TempFolder folder;
    TinyModel tiny = tiny_model({.q_bias = true, .o_bias = true, .seed = 2});
    for (auto& [name, tensor] : tiny.tensors) {
      tensor.dtype = dtype;
    }
    tiny.put_vector(layer_name(2, "mlp.up_proj.bias"), RowVectorF::Constant(40, 0.5F));
    tiny.config["rope_parameters"] = {{"rope_type", "linear"}, {"rope_theta", 100.0}, {"factor", 2.0}};
    tiny.config["sliding_window"] = 12;
    const Model model = open(tiny, folder);
    EXPECT_EQ(model.config().hidden_size, 24);
    EXPECT_EQ(model.checkpoint().path(), folder.path());
    EXPECT_EQ(model.tensors().size(), tiny.tensors.size());
    EXPECT_TRUE(model.has(Role::up_bias, 2));
    EXPECT_FALSE(model.has(Role::up_bias, 1));
    EXPECT_FALSE(model.has(Role::k_bias, 0));
    EXPECT_EQ(model.name_of(Role::q_bias, 1), "model.layers.1.self_attn.q_proj.bias");
    for (Index i = 0; i < 3; ++i) {
      const Layer layer = model.layer(i);
      const auto here = [&](const std::string& rest) { return stored(tiny, layer_name(i, rest)); };
      const auto& attention = std::get<GqaAttention>(layer.attention);
      EXPECT_TRUE(attention.q.weight == here("self_attn.q_proj.weight"));
      EXPECT_TRUE(attention.q.bias == here("self_attn.q_proj.bias"));
      EXPECT_TRUE(attention.k.weight == here("self_attn.k_proj.weight"));
      EXPECT_EQ(attention.k.bias.size(), 0);
      EXPECT_TRUE(attention.v.weight == here("self_attn.v_proj.weight"));
      EXPECT_TRUE(attention.o.weight == here("self_attn.o_proj.weight"));
      EXPECT_TRUE(attention.o.bias == here("self_attn.o_proj.bias"));
      EXPECT_EQ(attention.heads, 6);
      EXPECT_EQ(attention.kv_heads, 2);
      EXPECT_EQ(attention.head_dim, 8);
      EXPECT_EQ(attention.window, 12);
      EXPECT_FLOAT_EQ(attention.scale, std::sqrt(1 / 8.0F));
      EXPECT_EQ(attention.rotary.inv_freq.front(), 0.5F);
      EXPECT_TRUE(layer.input_norm.gain == here("input_layernorm.weight"));
      EXPECT_EQ(layer.input_norm.eps, 1e-5F);
      EXPECT_TRUE(model.input_norm(i).gain == layer.input_norm.gain);
      EXPECT_TRUE(layer.post_attention_norm.gain == here("post_attention_layernorm.weight"));
      EXPECT_TRUE(layer.mlp.gate.weight == here("mlp.gate_proj.weight"));
      EXPECT_TRUE(layer.mlp.up.weight == here("mlp.up_proj.weight"));
      EXPECT_EQ(layer.mlp.up.bias.size(), i == 2 ? 40 : 0);
      EXPECT_TRUE(layer.mlp.down.weight == here("mlp.down_proj.weight"));
      EXPECT_TRUE(std::get<GqaAttention>(model.attention(i)).k.weight == attention.k.weight);
    }
    EXPECT_TRUE(model.final_norm().gain == stored(tiny, "model.norm.weight"));

    const MatrixF embedding = stored(tiny, "model.embed_tokens.weight");
    const MatrixF rows = model.embed({7, 0, 49, 7});
    EXPECT_TRUE(rows.row(0) == embedding.row(7));
    EXPECT_TRUE(rows.row(1) == embedding.row(0));
    EXPECT_TRUE(rows.row(2) == embedding.row(49));
    EXPECT_TRUE(rows.row(3) == embedding.row(7));
    const MatrixF head = stored(tiny, "lm_head.weight");
    EXPECT_TRUE(model.head_rows(0, 50) == head);
    EXPECT_TRUE(model.head_rows(13, 4) == head.middleRows(13, 4));
  }
}

TEST(Model, TiedHeadIsTheEmbedding) {
  const TempFolder folder;
  TinyModel tiny = tiny_model({.tied = true});
  // What is stored beside it does not count.
  tiny.put("lm_head.weight", MatrixF::Ones(50, 24));
  const Model model = open(tiny, folder);
  EXPECT_TRUE(model.head_rows(5, 40) == stored(tiny, "model.embed_tokens.weight").middleRows(5, 40));
}

TEST(Model, LatentLayersAreWhatTheFileHolds) {
  const Index n = 5;
  const Index p = 6;
  for (const bool low_rank : {false, true}) {
    const TempFolder folder;
    const TinyModel tiny = tiny_latent_model({.q_rank = low_rank ? std::optional<Index>(9) : std::nullopt,
                                              .attention_bias = true,
                                              .interleave = false});
    const Model model = open(tiny, folder);
    const auto attention = std::get<LatentAttention>(model.attention(1));
    const auto here = [&](const std::string& rest) {
      return stored(tiny, layer_name(1, "self_attn." + rest));
    };
    EXPECT_EQ(attention.heads, 6);
    EXPECT_EQ(attention.nope_dim, n);
    EXPECT_EQ(attention.rope_dim, p);
    EXPECT_EQ(attention.v_dim, 7);
    EXPECT_FLOAT_EQ(attention.scale, std::sqrt(1 / 11.0F));
    EXPECT_EQ(attention.total_rank(), 11);
    if (low_rank) {
      EXPECT_TRUE(attention.q_down.weight == here("q_a_proj.weight"));
      EXPECT_TRUE(attention.q_down.bias == here("q_a_proj.bias"));
      EXPECT_TRUE(attention.q_norm.gain == here("q_a_layernorm.weight"));
      EXPECT_EQ(attention.q_norm.eps, 1e-6F);
      EXPECT_TRUE(attention.q.weight == here("q_b_proj.weight"));
    } else {
      EXPECT_EQ(attention.q_down.out(), 0);
      EXPECT_FALSE(attention.q_norm.present());
      EXPECT_TRUE(attention.q.weight == here("q_proj.weight"));
    }
    ASSERT_EQ(attention.branches.size(), 1U);
    const LatentBranch& branch = attention.branches.front();
    EXPECT_EQ(branch.first_head, 0);
    EXPECT_EQ(branch.head_count, 6);
    EXPECT_TRUE(branch.down.weight == here("kv_a_proj_with_mqa.weight").topRows(11));
    EXPECT_TRUE(branch.down.bias == here("kv_a_proj_with_mqa.bias").leftCols(11));
    EXPECT_TRUE(branch.norm.gain == here("kv_a_layernorm.weight"));
    // The latent norms have an eps of their own, whatever the config says.
    EXPECT_EQ(branch.norm.eps, 1e-6F);
    EXPECT_TRUE(branch.up == here("kv_b_proj.weight"));
    EXPECT_TRUE(attention.rotary_key.weight == here("kv_a_proj_with_mqa.weight").bottomRows(p));
    EXPECT_TRUE(attention.rotary_key.bias == here("kv_a_proj_with_mqa.bias").rightCols(p));
    EXPECT_TRUE(attention.o.bias == here("o_proj.bias"));
  }
}

// Interleaved rows (2j, 2j + 1) become halves (j, j + p/2), in the query of every head and in the key.
TEST(Model, InterleavedRotaryRowsAreBroughtToHalves) {
  const TempFolder folder;
  TinyModel tiny = tiny_latent_model({.attention_bias = true});
  const auto pairs = std::get<LatentAttention>(open(tiny, folder).attention(0));
  tiny.config["rope_interleave"] = false;
  const auto halves = std::get<LatentAttention>(open(tiny, folder).attention(0));
  const Index order[] = {0, 2, 4, 1, 3, 5};
  for (Index j = 0; j < 6; ++j) {
    EXPECT_TRUE(pairs.rotary_key.weight.row(j) == halves.rotary_key.weight.row(order[j]));
    EXPECT_EQ(pairs.rotary_key.bias(j), halves.rotary_key.bias(order[j]));
    for (Index h = 0; h < 6; ++h) {
      EXPECT_TRUE(pairs.q.weight.row(h * 11 + 5 + j) == halves.q.weight.row(h * 11 + 5 + order[j]));
    }
  }
  for (Index h = 0; h < 6; ++h) {
    EXPECT_TRUE(pairs.q.weight.middleRows(h * 11, 5) == halves.q.weight.middleRows(h * 11, 5));
  }
  EXPECT_TRUE(pairs.branches[0].down.weight == halves.branches[0].down.weight);
}

TEST(Model, ScaledRotationReachesTheSoftmax) {
  const TempFolder folder;
  TinyModel tiny = tiny_latent_model();
  tiny.config["rope_parameters"] = {{"rope_type", "yarn"}, {"rope_theta", 100.0},
                                    {"factor", 8.0},       {"original_max_position_embeddings", 64},
                                    {"mscale", 1.0},       {"mscale_all_dim", 1.0}};
  const double mscale = 0.1 * std::log(8.0) + 1;
  const auto attention = std::get<LatentAttention>(open(tiny, folder).attention(0));
  EXPECT_NEAR(static_cast<double>(attention.scale), mscale * mscale / std::sqrt(11.0), 1e-7);
  EXPECT_EQ(attention.rotary.attention_factor, 1.0F);
}

TEST(Model, RefusesWhatItsPartsRefuse) {
  const TempFolder folder;
  expect_error(ErrorKind::input, {"config.json"}, [&] { Model::open(folder.path()); });
  TinyModel tiny = tiny_model();
  tiny.tensors.erase("model.norm.weight");
  tiny.write(folder.path());
  expect_error(ErrorKind::input, {folder.path().string(), "model.norm.weight"},
               [&] { Model::open(folder.path()); });
  tiny.config["model_type"] = "gpt2";
  tiny.write(folder.path());
  expect_error(ErrorKind::input, {"gpt2"}, [&] { Model::open(folder.path()); });
}

TEST(Model, OpensTheTrainedExample) {
  const Model model = Model::open(RELATENT_EXAMPLES "/llama-3m");
  EXPECT_EQ(model.config().num_hidden_layers, 4);
  EXPECT_EQ(model.config().gqa->num_key_value_heads, 4);
  EXPECT_EQ(model.config().dtype, DType::bf16);
  const auto attention = std::get<GqaAttention>(model.attention(3));
  EXPECT_EQ(attention.k.weight.rows(), 128);
  EXPECT_TRUE(attention.k.weight.allFinite());
}

}  // namespace
}  // namespace relatent
