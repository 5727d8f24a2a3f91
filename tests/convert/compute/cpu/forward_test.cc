#include "convert/compute/cpu/forward.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "convert/compute/backend.h"
#include "convert/compute/cpu/mlp.h"
#include "convert/compute/cpu/products.h"
#include "tests/support/opened_model.h"
#include "tests/support/reference.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::apply;
using testing_support::kFloatNoise;
using testing_support::open;
using testing_support::position_of;
using testing_support::random_sequences;
using testing_support::relative_error;
using testing_support::run;
using testing_support::TempFolder;
using testing_support::ThreadCount;
using testing_support::tiny_model;
using testing_support::TinyModel;

// down(silu(gate x) * up x) of the normed state, in double precision.
VectorD mlp_by_the_book(const Layer& layer, const VectorD& hidden) {
  const VectorD x = apply(layer.post_attention_norm, hidden);
  const VectorD gate = apply(layer.mlp.gate, x);
  const VectorD up = apply(layer.mlp.up, x);
  VectorD inner(gate.size());
  for (Index i = 0; i < gate.size(); ++i) {
    inner(i) = gate(i) / (1 + std::exp(-gate(i))) * up(i);
  }
  return apply(layer.mlp.down, inner);
}

TEST(Forward, StreamStartsWithTheEmbedding) {
  const TempFolder folder;
  const Model model = open(tiny_model(), folder);
  const Sequences sequences = random_sequences(1, 3, 5, 50);
  Stream stream(model, sequences);
  EXPECT_EQ(stream.count(), 3);
  EXPECT_EQ(stream.length(), 5);
  EXPECT_TRUE(stream.hidden() == model.embed(sequences.tokens));
  stream.sequence(1).setZero();
  EXPECT_TRUE(stream.hidden().middleRows(5, 5).isZero(0));
  EXPECT_FALSE(stream.hidden().middleRows(4, 1).isZero(0));
  EXPECT_FALSE(stream.hidden().middleRows(10, 1).isZero(0));
}

TEST(Forward, LayerIsAttentionThenMlpOnTheNormedStream) {
  const TempFolder folder;
  TinyModel tiny = tiny_model({.q_bias = true, .o_bias = true});
  tiny.put_vector("model.layers.1.mlp.gate_proj.bias", RowVectorF::LinSpaced(40, -1, 1));
  tiny.put_vector("model.layers.1.mlp.down_proj.bias", RowVectorF::LinSpaced(24, -1, 1));
  const Model model = open(tiny, folder);
  const Sequences sequences = random_sequences(2, 3, 9, 50);
  Stream stream(model, sequences);
  for (Index i = 0; i < 3; ++i) {
    const Layer layer = model.layer(i);
    const auto& attention = std::get<GqaAttention>(layer.attention);
    MatrixD expected = stream.hidden().cast<double>();
    for (Index s = 0; s < 3; ++s) {
      const MatrixF hidden = stream.sequence(s);
      MatrixF x(9, 24);
      for (Index n = 0; n < 9; ++n) {
        x.row(n) = apply(layer.input_norm, position_of(hidden, n)).cast<float>().transpose();
      }
      EXPECT_LE(relative_error(normed(layer.input_norm, stream.sequence(s)), x), kFloatNoise);
      const MatrixD mixed = testing_support::mix_by_the_book(attention, x);
      for (Index n = 0; n < 9; ++n) {
        VectorD h = expected.row(s * 9 + n).transpose() + apply(attention.o, mixed.row(n).transpose());
        h += mlp_by_the_book(layer, h);
        expected.row(s * 9 + n) = h.transpose();
      }
    }
    run_layer(layer, stream);
    EXPECT_LE(relative_error(stream.hidden(), expected), kFloatNoise) << "layer " << i;
  }
}

TEST(Forward, MlpLeavesOtherSequencesAlone) {
  const TempFolder folder;
  const Model model = open(tiny_model(), folder);
  Stream stream(model, random_sequences(3, 2, 4, 50));
  const MatrixF before = stream.hidden();
  const Layer layer = model.layer(0);
  const MatrixF added =
      product(layer.mlp.down, gated(layer.mlp, normed(layer.post_attention_norm, stream.sequence(1))));
  add_mlp(layer, stream, 1, 1);
  EXPECT_TRUE(stream.hidden().topRows(4) == before.topRows(4));
  EXPECT_LE(relative_error(stream.hidden().bottomRows(4), before.bottomRows(4) + added), kFloatNoise);
  EXPECT_FALSE(added.isZero(1e-3F));
}

TEST(Forward, ExpertsAddToTheSharedOnes) {
  const TempFolder folder;
  const Model model =
      open(testing_support::tiny_latent_model({.experts = testing_support::tiny_experts()}), folder);
  const Layer layer = model.layer(1);
  EXPECT_FALSE(model.layer(0).experts);
  ASSERT_TRUE(layer.experts);
  EXPECT_EQ(layer.mlp.gate.weight.rows(), 20);
  EXPECT_EQ(layer.experts->expert(3).down.weight.cols(), 10);
  Stream stream(model, random_sequences(3, 2, 4, 50));
  const MatrixF before = stream.sequence(1);
  const MatrixF x = normed(layer.post_attention_norm, before);
  const MatrixF shared = product(layer.mlp.down, gated(layer.mlp, x));
  const MatrixF added = mix_experts(*layer.experts, x);
  EXPECT_FALSE(added.isZero(1e-3F));
  add_mlp(layer, stream, 1, 1);
  EXPECT_LE(relative_error(stream.sequence(1), before + shared + added), kFloatNoise);
}

TEST(Forward, ALayerMayHaveNoSharedExperts) {
  const TempFolder folder;
  const Model model = open(testing_support::tiny_mixture_model({.model_type = "mixtral"}), folder);
  const Layer layer = model.layer(0);
  ASSERT_TRUE(layer.experts);
  EXPECT_EQ(layer.mlp.down.out(), 0);
  Stream stream(model, random_sequences(3, 2, 4, 50));
  const MatrixF before = stream.sequence(1);
  const MatrixF added = mix_experts(*layer.experts, normed(layer.post_attention_norm, before));
  add_mlp(layer, stream);
  EXPECT_LE(relative_error(stream.sequence(1), before + added), kFloatNoise);
}

// More tokens than a batch has: the last of them comes with others than before.
TEST(Forward, ExpertsAreReadOnceForABatchOfSequences) {
  const TempFolder folder;
  const Model model = open(testing_support::tiny_mixture_model({.model_type = "qwen2_moe"}), folder);
  Layer layer = model.layer(2);
  std::atomic<int> read = 0;
  layer.experts->expert = [&read, all = layer.experts->expert](Index e) {
    ++read;
    return all(e);
  };
  const Sequences all = random_sequences(3, 1000, 10, 50);
  Stream stream(model, all);
  add_mlp(layer, stream);
  EXPECT_EQ(read, 2 * 5);
  Stream alone(model, last_sequences(all, 1));
  add_mlp(layer, alone);
  EXPECT_LE(relative_error(stream.sequence(999), alone.sequence(0)), kFloatNoise);
}

TEST(Forward, ExpertsGiveTheSameForAnyNumberOfThreads) {
  for (const testing_support::TinyModel& tiny :
       {testing_support::tiny_latent_model({.experts = testing_support::tiny_experts()}),
        testing_support::tiny_mixture_model({.model_type = "mixtral"}),
        testing_support::tiny_mixture_model({.model_type = "qwen2_moe"}),
        testing_support::tiny_mixture_model({.model_type = "qwen3_moe"})}) {
    const TempFolder folder;
    const Model model = open(tiny, folder);
    std::vector<MatrixF> found;
    for (const int threads : {1, 2, 5}) {
      const ThreadCount count(threads);
      Stream stream(model, random_sequences(9, 70, 11, 50));
      run(model, stream);
      found.push_back(stream.hidden());
    }
    EXPECT_TRUE(found[1] == found[0]);
    EXPECT_TRUE(found[2] == found[0]);
  }
}

}  // namespace
}  // namespace relatent
