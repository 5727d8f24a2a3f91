#include "convert/engines/deepseek.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "convert/model/model.h"
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
using testing_support::TinyModel;
using testing_support::TinyOptions;

Rotary geometric(double base, Index size) {
  Rotary out;
  for (Index i = 0; i < size / 2; ++i) {
    out.inv_freq.push_back(
        static_cast<float>(std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(size))));
  }
  return out;
}

TEST(GeometricBase, IsFoundFromTheList) {
  for (const double base : {10000.0, 500000.0, 1e6, 1234.5}) {
    for (const Index size : {4, 16, 64, 128}) {
      EXPECT_NEAR(geometric_base(geometric(base, size)) / base, 1, 1e-6) << base << " " << size;
    }
    // Whole numbers come back whole.
    if (base != 1234.5) {
      EXPECT_EQ(geometric_base(geometric(base, 64)), base);
    }
  }
  // One frequency is 1 with any base.
  EXPECT_GT(geometric_base(geometric(10000, 2)), 1);
}

TEST(GeometricBase, RefusesOtherLists) {
  Rotary bent = geometric(10000, 16);
  bent.inv_freq[3] *= 1.001F;
  EXPECT_THROW(geometric_base(bent), std::invalid_argument);
  Rotary late = geometric(10000, 16);
  late.inv_freq.erase(late.inv_freq.begin());
  EXPECT_THROW(geometric_base(late), std::invalid_argument);
  Rotary loud = geometric(10000, 16);
  loud.attention_factor = 1.1F;
  EXPECT_THROW(geometric_base(loud), std::invalid_argument);
  EXPECT_THROW(geometric_base(Rotary{}), std::invalid_argument);
}

constexpr Index kHidden = 24;
LatentShape deepseek_shape() {
  LatentShape out;
  out.heads = 6;
  out.qk_nope_head_dim = 5;
  out.qk_rope_head_dim = 8;
  out.v_head_dim = 7;
  out.kv_lora_rank = 9;
  out.norm_coordinates = 3;
  return out;
}
const LatentShape kShape = deepseek_shape();

LatentAttention random_layer(Random& random) {
  LatentAttention out;
  out.heads = kShape.heads;
  out.nope_dim = kShape.qk_nope_head_dim;
  out.rope_dim = kShape.qk_rope_head_dim;
  out.v_dim = kShape.v_head_dim;
  out.scale = 0.4F;  // not what an engine would take by itself
  out.rotary = geometric(10000, kShape.qk_rope_head_dim);
  const Index rank = kShape.kv_lora_rank + kShape.norm_coordinates;
  out.q = random.linear(kShape.heads * (kShape.qk_nope_head_dim + kShape.qk_rope_head_dim), kHidden, false);
  out.rotary_key = random.linear(kShape.qk_rope_head_dim, kHidden, false);
  LatentBranch branch;
  branch.head_count = kShape.heads;
  branch.down = random.linear(rank, kHidden, false);
  branch.norm = {random.row(rank).array() + 2.0F, 1e-6F};
  branch.up = random.matrix(kShape.heads * (kShape.qk_nope_head_dim + kShape.v_head_dim), rank, 0.3);
  out.branches.push_back(branch);
  out.o = random.linear(kHidden, kShape.heads * kShape.v_head_dim, false);
  return out;
}

// Written as the engine does and read as any deepseek_v3 folder is, the layer is the same.
TEST(Deepseek, ReadsBackAsWritten) {
  Random random(1);
  const TempFolder temp;
  TinyModel source = testing_support::tiny_model(TinyOptions{.layers = 1});
  source.write(temp / "source");
  const Model before = Model::open(temp / "source");
  const std::unique_ptr<Engine> engine = make_deepseek_engine();
  const LatentAttention layer = random_layer(random);

  const testing_support::AttentionOutput attention(*engine, before.checkpoint().config(), before.config(),
                                                   kShape, 1, DType::f32);
  std::vector<TensorSpec> specs = attention.specs();
  for (const TensorSpec& spec : specs) {
    EXPECT_EQ(spec.name.find("bias"), std::string::npos);
  }
  std::vector<std::string> copied;
  for (const PlacedTensor& tensor : before.tensors()) {
    if (!is_attention(tensor.role)) {
      specs.push_back({tensor.name, DType::f32, before.checkpoint().info(tensor.name).shape});
      copied.push_back(tensor.name);
    }
  }
  std::filesystem::create_directory(temp / "out");
  CheckpointWriter writer(temp / "out", specs, 1'000'000'000);
  for (const std::string& name : copied) {
    writer.copy(name, before.folder("copied"), name);
  }
  attention.write(layer, 0, writer);
  writer.finish();
  const Json config =
      engine->config(before.checkpoint().config(), before.config(), kShape, layer.rotary, DType::f32);
  write_text(temp / "out" / "config.json", config.dump());
  EXPECT_EQ(config.at("attention_bias"), false);
  EXPECT_EQ(config.at("tie_word_embeddings"), false);
  EXPECT_EQ(config.at("kv_lora_rank"), kShape.kv_lora_rank + kShape.norm_coordinates);
  EXPECT_EQ(config.at("rope_theta"), 10000.0);

  const Model after = Model::open(temp / "out");
  EXPECT_EQ(after.config().cache_elements(), 9 + 3 + 8);
  const MatrixF x = testing_support::sample_inputs(random, 20, kHidden);
  EXPECT_LE(
      relative_error(testing_support::output_of(after.attention(0), x), testing_support::output_of(layer, x)),
      kFloatNoise);
}

TEST(Deepseek, RefusesWhatTheLayoutCannotHold) {
  Random random(2);
  const TempFolder temp;
  testing_support::tiny_model(TinyOptions{.layers = 1}).write(temp / "source");
  const Model source = Model::open(temp / "source");
  const std::unique_ptr<Engine> engine = make_deepseek_engine();
  const testing_support::AttentionOutput attention(*engine, source.checkpoint().config(), source.config(),
                                                   kShape, 1, DType::f32);
  const auto write = [&](const LatentAttention& layer) {
    CheckpointWriter writer(temp.path(), attention.specs(), 1'000'000'000);
    attention.write(layer, 0, writer);
  };
  LatentAttention no_norm = random_layer(random);
  no_norm.branches.front().norm = {};
  EXPECT_THROW(write(no_norm), std::logic_error);
  LatentAttention biased = random_layer(random);
  biased.o.bias = random.row(kHidden);
  EXPECT_THROW(write(biased), std::logic_error);
}

}  // namespace
}  // namespace relatent
