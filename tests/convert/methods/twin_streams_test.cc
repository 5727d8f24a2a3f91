#include "convert/methods/twin_streams.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <utility>

#include "convert/compute/backend.h"
#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/products.h"
#include "convert/compute/cpu/sample.h"
#include "convert/latent/assemble.h"
#include "convert/latent/lossless.h"
#include "convert/latent/refit.h"
#include "convert/plan/memory.h"
#include "examples_path.h"
#include "tests/support/reference.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_count.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::apply;
using testing_support::kFloatNoise;
using testing_support::output_of;
using testing_support::Random;
using testing_support::random_sequences;
using testing_support::relative_error;
using testing_support::TempFolder;
using testing_support::ThreadCount;
using testing_support::tiny_model;
using testing_support::TinyOptions;

Model tiny(const TempFolder& folder, const TinyOptions& options = {}) {
  tiny_model(options).write(folder / "model");
  return Model::open(folder / "model");
}

// The layer's own attention in latent form.
LatentAttention lossless(const Layer& layer) {
  const auto& attention = std::get<GqaAttention>(layer.attention);
  const LayerMaps maps = maps_of(attention);
  const Moments moments = moments_without_data(layer.input_norm, attention.heads, 32);
  return assemble_mla(maps, moments, lossless_rotary_key(maps), lossless_latent(maps), {});
}

// The same with something wrong in every head.
LatentAttention damaged(const Layer& layer, std::uint32_t seed, bool bias) {
  LatentAttention out = lossless(layer);
  Random random(seed);
  MatrixF& up = out.branches[0].up;
  up += random.matrix(up.rows(), up.cols(), 0.1);
  out.q.weight += random.matrix(out.q.weight.rows(), out.q.weight.cols(), 0.05);
  if (bias) {
    out.o.bias = random.row(out.o.out(), 0.1);
  }
  return out;
}

TEST(TwinStreams, LosslessAttentionKeepsThemTogether) {
  const Model model = Model::open(RELATENT_EXAMPLES "/llama-3m");
  const Sequences sequences =
      read_sequences(RELATENT_EXAMPLES "/tokens/calibration.npy", 48, 6, model.config().vocab_size);
  for (const bool refit : {false, true}) {
    TwinStreams streams(model, sequences);
    Stream alone(model, sequences);
    EXPECT_TRUE(streams.source().hidden() == alone.hidden());
    EXPECT_TRUE(streams.converted().hidden() == alone.hidden());
    for (Index i = 0; i < model.config().num_hidden_layers; ++i) {
      const Layer layer = model.layer(i);
      streams.sample_attention(layer, {.stride = 4, .affine = false, .query_affine = false});
      LatentAttention converted = lossless(layer);
      const MatrixF before = converted.o.weight;
      streams.finish_attention(layer, converted, refit, 0.1);
      if (refit) {
        EXPECT_LE(relative_error(converted.o.weight, before), kFloatNoise) << i;
      } else {
        EXPECT_TRUE(converted.o.weight == before) << i;
      }
      EXPECT_EQ(converted.o.bias.size(), 0);
      EXPECT_LE(relative_error(streams.converted().hidden(), streams.source().hidden()), kFloatNoise) << i;
      streams.finish_layer(layer);
      EXPECT_LE(relative_error(streams.converted().hidden(), streams.source().hidden()), kFloatNoise) << i;
      run_layer(layer, alone);
      EXPECT_LE(relative_error(streams.source().hidden(), alone.hidden()), kFloatNoise) << i;
    }
  }
}

TEST(TwinStreams, FirstTargetIsTheSourcesAttention) {
  const Model model = Model::open(RELATENT_EXAMPLES "/llama-3m");
  const Sequences sequences =
      read_sequences(RELATENT_EXAMPLES "/tokens/calibration.npy", 40, 3, model.config().vocab_size);
  const Layer layer = model.layer(0);
  const Stream start(model, sequences);
  for (const Index stride : {1, 3, 1000}) {
    TwinStreams streams(model, sequences);
    const AttentionSample sample =
        streams.sample_attention(layer, {.stride = stride, .affine = true, .query_affine = true});
    EXPECT_EQ(sample.stride, std::min<Index>(stride, 40));
    for (Index s = 0; s < 3; ++s) {
      const MatrixF output = output_of(layer.attention, normed(layer.input_norm, start.sequence(s)));
      for (Index i = 0; i < sample.per_sequence(); ++i) {
        EXPECT_LE(relative_error(sample.target.row(s * sample.per_sequence() + i),
                                 output.row(sample.position(s, i))),
                  kFloatNoise);
      }
      EXPECT_LE(relative_error(streams.source().sequence(s), start.sequence(s) + output), kFloatNoise);
      EXPECT_TRUE(streams.converted().sequence(s) == start.sequence(s));
    }
  }
}

// Once the streams have parted the source's side comes from the source's stream, everything else from the
// other.
TEST(TwinStreams, SampleKnowsBothStreams) {
  const TempFolder folder;
  const Model model = tiny(folder, {.q_bias = true, .kv_bias = true, .o_bias = true});
  const Sequences sequences = random_sequences(1, 5, 17, 50);
  for (const bool affine : {false, true}) {
    TwinStreams streams(model, sequences);
    const Layer first = model.layer(0);
    streams.sample_attention(first, {.stride = 1, .affine = affine, .query_affine = affine});
    LatentAttention other = damaged(first, 2, true);
    streams.finish_attention(first, other, false, 0);
    streams.finish_layer(first);
    const Stream source = streams.source();
    const Stream converted = streams.converted();
    EXPECT_GT(relative_error(converted.hidden(), source.hidden()), 1e-2);

    const Layer layer = model.layer(1);
    const auto& gqa = std::get<GqaAttention>(layer.attention);
    const AttentionSample sample =
        streams.sample_attention(layer, {.stride = 4, .affine = affine, .query_affine = affine});
    EXPECT_EQ(sample.count, 5);
    EXPECT_EQ(sample.length, 17);
    EXPECT_EQ(sample.stride, 4);
    EXPECT_EQ(sample.head_dim, 8);
    EXPECT_EQ(sample.group_size, 3);
    ASSERT_EQ(sample.per_sequence(), 4);
    ASSERT_EQ(sample.sampled_inputs.rows(), 20);
    MatrixD moment = MatrixD::Zero(25, 25);
    MatrixF values(85, 16);
    for (Index s = 0; s < 5; ++s) {
      const MatrixF x = normed(layer.input_norm, source.sequence(s));
      const MatrixF inputs = sample.inputs(s);
      EXPECT_TRUE(inputs.leftCols(24) == normed(layer.input_norm, converted.sequence(s)));
      EXPECT_TRUE(inputs.col(24) == VectorF::Constant(17, affine ? 1.0F : 0.0F));
      const MatrixF output = output_of(gqa, x);
      values.middleRows(s * 17, 17) = product(gqa.v, x);
      for (Index n = 0; n < 17; ++n) {
        const VectorD key = apply(gqa.k, testing_support::position_of(x, n));
        for (Index g = 0; g < 2; ++g) {
          EXPECT_LE(relative_error(sample.source_key.row(s * 17 + n).segment(g * 8, 8).transpose(),
                                   testing_support::rotated(gqa.rotary, n, key.segment(g * 8, 8))),
                    kFloatNoise);
        }
      }
      for (Index i = 0; i < 4; ++i) {
        const Index at = sample.position(s, i);
        const Index row = s * 4 + i;
        EXPECT_TRUE(sample.sampled_inputs.row(row) == inputs.row(at));
        const VectorD query =
            static_cast<double>(gqa.scale) * apply(gqa.q, testing_support::position_of(x, at));
        for (Index h = 0; h < 6; ++h) {
          EXPECT_LE(relative_error(sample.source_query.row(row).segment(h * 8, 8).transpose(),
                                   testing_support::rotated(gqa.rotary, at, query.segment(h * 8, 8))),
                    kFloatNoise);
        }
        EXPECT_LE(relative_error(sample.target.row(row),
                                 source.sequence(s).row(at) + output.row(at) - converted.sequence(s).row(at)),
                  kFloatNoise);
        moment += (inputs.row(at).transpose() * inputs.row(at)).cast<double>() / 20;
      }
    }
    EXPECT_LE(relative_error(sample.input_moment, moment), kFloatNoise);
    AttentionSample again = sample;
    measure_value_spread(values, gqa.o.weight, again);
    EXPECT_LE(relative_error(sample.value_spread, again.value_spread), kFloatNoise);
    EXPECT_GT(sample.value_spread.minCoeff(), 0);
  }
}

// One layer's attention on both streams, the second a damaged one.
struct Finished {
  LatentAttention attention;
  MatrixF wanted;  // the source's stream past its attention
  MatrixF before;  // the converted stream before
  MatrixF after;
  MatrixF mixed;  // what o_proj reads
};

Finished finished(const Model& model, const Sequences& sequences, bool bias, bool refit, double ridge) {
  TwinStreams streams(model, sequences);
  const Layer layer = model.layer(0);
  streams.sample_attention(layer, {.stride = 8, .affine = bias, .query_affine = bias});
  Finished out{damaged(layer, 3, bias), streams.source().hidden(), streams.converted().hidden(), {}, {}};
  const RotaryTable table(out.attention.rotary, sequences.length);
  out.mixed.resize(out.before.rows(), out.attention.o.weight.cols());
  for (Index s = 0; s < sequences.count; ++s) {
    out.mixed.middleRows(s * sequences.length, sequences.length) =
        attention_forward(out.attention, normed(layer.input_norm, streams.converted().sequence(s)), table);
  }
  streams.finish_attention(layer, out.attention, refit, ridge);
  EXPECT_TRUE(streams.source().hidden() == out.wanted);
  out.after = streams.converted().hidden();
  EXPECT_LE(relative_error(out.after, out.before + product(out.attention.o, out.mixed)), kFloatNoise);
  return out;
}

double squared_error(const Finished& finished) {
  return (finished.after - finished.wanted).cast<double>().squaredNorm();
}

TEST(TwinStreams, MemoryCountsWhatASampleHoldsPerQuery) {
  const TempFolder folder;
  const Model model = tiny(folder);
  const Sequences sequences = random_sequences(9, 4, 20, model.config().vocab_size);
  const auto bytes = [&](const AttentionSample& sample) {
    // Every map's column of ones is not worth counting.
    const Index numbers = sample.sampled_inputs.cols() - 1 + sample.query_inputs.cols() - 1 +
                          sample.source_query.cols() + sample.target.cols();
    return static_cast<std::uint64_t>(sample.count * sample.per_sequence() * numbers) * sizeof(float);
  };
  const auto sampled = [&](Index stride) {
    return bytes(
        TwinStreams(model, sequences)
            .sample_attention(model.layer(0), {.stride = stride, .affine = true, .query_affine = false}));
  };
  const std::uint64_t weights =
      (80 - 20) * 20 / 2 * sizeof(float) * static_cast<std::uint64_t>(model.config().num_attention_heads);
  EXPECT_EQ(
      streams_memory(model.config(), sequences, 1, 12) - streams_memory(model.config(), sequences, 4, 12),
      sampled(1) - sampled(4) + weights);

  ModelConfig low_rank = model.config();
  low_rank.gqa.reset();
  low_rank.latent = LatentGeometry{};
  const std::uint64_t whole = streams_memory(low_rank, sequences, 4, 12);
  low_rank.latent->q_lora_rank = 7;
  const auto saved = static_cast<std::uint64_t>(model.config().hidden_size - 7) * 20 * sizeof(float);
  EXPECT_EQ(whole - streams_memory(low_rank, sequences, 4, 12), saved);
}

TEST(TwinStreams, RefitIsRidgeRegressionToTheSourcesStream) {
  const TempFolder folder;
  const Model model = tiny(folder);
  const Sequences sequences = random_sequences(4, 12, 30, 50);
  for (const bool bias : {false, true}) {
    const Finished plain = finished(model, sequences, bias, false, 0);
    const LatentAttention start = damaged(model.layer(0), 3, bias);
    EXPECT_TRUE(plain.attention.o.weight == start.o.weight);
    EXPECT_TRUE(plain.attention.o.bias == start.o.bias);
    double before = squared_error(plain);
    for (const double ridge : {0.2, 1e-2, 1e-4}) {
      const Finished refit = finished(model, sequences, bias, true, ridge);
      EXPECT_LT(squared_error(refit), before) << ridge;
      before = squared_error(refit);
      // Biases are read off a constant feature.
      const Index features = 48 + (bias ? 1 : 0);
      MatrixD a = MatrixD::Ones(plain.mixed.rows(), features);
      a.leftCols(48) = plain.mixed.cast<double>();
      const MatrixD errors = (plain.wanted - plain.after).cast<double>();
      MatrixD system = a.transpose() * a;
      // A missing bias counts as one that has nothing to say.
      system.diagonal().array() += ridge * ridge_for_scarcity(360, 48) * system.diagonal().sum() / 49;
      const MatrixD delta = system.ldlt().solve(a.transpose() * errors).transpose();
      EXPECT_LE(relative_error(refit.attention.o.weight - start.o.weight, delta.leftCols(48)), 1e-3) << ridge;
      if (bias) {
        EXPECT_LE(relative_error(refit.attention.o.bias - start.o.bias, delta.rightCols<1>().transpose()),
                  1e-3)
            << ridge;
      } else {
        EXPECT_EQ(refit.attention.o.bias.size(), 0);
      }
    }
  }
}

// More tokens than a refit looks at, in more sequences than it holds at once.
TEST(TwinStreams, RefitOfManyTokensNeedsOnlySome) {
  const TempFolder folder;
  const Model model = tiny(folder);
  // Every sixth position is what is looked at: which one differs between sequences, or it would be these.
  Sequences sequences = random_sequences(5, 100, 96, 50);
  for (std::size_t i = 0; i < sequences.tokens.size(); ++i) {
    if (i % 6 == 0 || i % 96 < 16) {
      sequences.tokens[i] %= 3;
    }
  }
  const Finished refit = finished(model, sequences, true, true, 1e-4);
  const MatrixD wanted = (refit.wanted - refit.before).cast<double>();
  MatrixD a = MatrixD::Ones(refit.mixed.rows(), 49);
  a.leftCols(48) = refit.mixed.cast<double>();
  const MatrixD best = (a.transpose() * a).ldlt().solve(a.transpose() * wanted);
  const double least = (wanted - a * best).squaredNorm();
  EXPECT_GT(least, 0);
  EXPECT_LT(squared_error(refit), 1.1 * least);
  EXPECT_GT(squared_error(finished(model, sequences, true, false, 0)), 2 * least);
}

TEST(TwinStreams, AreTheSameForAnyThreadCount) {
  const TempFolder folder;
  const Model model = tiny(folder);
  const Sequences sequences = random_sequences(6, 20, 48, 50);
  const auto run = [&](int threads) {
    const ThreadCount scope(threads);
    TwinStreams streams(model, sequences);
    std::pair<MatrixF, AttentionSample> out;
    for (Index i = 0; i < 2; ++i) {
      const Layer layer = model.layer(i);
      out.second = streams.sample_attention(layer, {.stride = 5, .affine = true, .query_affine = true});
      LatentAttention attention = damaged(layer, 7, true);
      streams.finish_attention(layer, attention, true, 0.1);
      streams.finish_layer(layer);
    }
    out.first = streams.converted().hidden();
    return out;
  };
  const auto [one, sample_of_one] = run(1);
  const auto [two, sample_of_two] = run(2);
  EXPECT_TRUE(one == two);
  EXPECT_TRUE(sample_of_one.sampled_inputs == sample_of_two.sampled_inputs);
  EXPECT_TRUE(sample_of_one.input_moment == sample_of_two.input_moment);
  EXPECT_TRUE(sample_of_one.source_query == sample_of_two.source_query);
  EXPECT_TRUE(sample_of_one.source_key == sample_of_two.source_key);
  EXPECT_TRUE(sample_of_one.target == sample_of_two.target);
  EXPECT_TRUE(sample_of_one.value_spread == sample_of_two.value_spread);
}

}  // namespace
}  // namespace relatent
