#include "convert/calibrate/calibrate.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "convert/compute/backend.h"
#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/products.h"
#include "tests/support/expect_error.h"
#include "tests/support/reference.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_count.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::random_sequences;
using testing_support::read_bytes;
using testing_support::relative_error;
using testing_support::TempFolder;
using testing_support::ThreadCount;
using testing_support::tiny_model;

void ignore(Index /*done*/, Index /*all*/) {}

// What a sequence's tokens weigh for keys and values, by the attention that they receive.
VectorD weights_of(const VectorD& received) {
  const VectorD root = received.cwiseSqrt();
  return 0.1 + 0.9 * root.array() / root.mean();
}

// The same of a sequence of inputs; sums are added to.
VectorD weights_by_the_book(const GqaAttention& attention, const MatrixF& x, AttentionSums& sums) {
  AttentionSums here(attention.heads, x.rows());
  testing_support::mix_by_the_book(attention, x, &here);
  sums.distance_mass += here.distance_mass;
  sums.mass_square += here.mass_square;
  sums.score_effect += here.score_effect;
  return weights_of(here.received);
}

TEST(Calibrate, MomentsAreThoseOfTheModelsOwnInputs) {
  // 150 sequences of 60 are more than one batch of tokens.
  for (const auto& [sequence_count, length] : {std::pair<Index, Index>{4, 9}, {150, 60}}) {
    const TempFolder folder;
    tiny_model({.layers = 2, .q_bias = true, .kv_bias = true}).write(folder / "model");
    const Model model = Model::open(folder / "model");
    const Sequences sequences = random_sequences(2, sequence_count, length, 50);
    std::vector<std::pair<Index, Index>> progress;
    calibrate(model, sequences, folder / "moments.h5",
              [&](Index done, Index all) { progress.emplace_back(done, all); });
    EXPECT_EQ(progress, (std::vector<std::pair<Index, Index>>{{1, 2}, {2, 2}}));

    const CalibrationFile file = CalibrationFile::open(folder / "moments.h5");
    EXPECT_EQ(file.header().source_fingerprint, model.checkpoint().fingerprint());
    EXPECT_EQ(nlohmann::ordered_json::parse(file.header().source_config), model.checkpoint().config());
    EXPECT_EQ(file.header().model_type, "llama");
    EXPECT_EQ(file.header().hidden_size, 24);
    EXPECT_EQ(file.header().num_hidden_layers, 2);
    EXPECT_EQ(file.header().num_attention_heads, 6);
    EXPECT_EQ(file.sequences().tokens, sequences.tokens);
    EXPECT_EQ(file.sequences().length, length);

    Stream stream(model, sequences);
    for (Index i = 0; i < 2; ++i) {
      const Layer layer = model.layer(i);
      const auto& attention = std::get<GqaAttention>(layer.attention);
      const LayerMoments found = file.layer(i);
      EXPECT_EQ(found.tokens, sequence_count * length);
      MatrixD second = MatrixD::Zero(24, 24);
      VectorD mean = VectorD::Zero(24);
      MatrixD received = MatrixD::Zero(24, 24);
      VectorD received_mean = VectorD::Zero(24);
      AttentionSums sums(6, length);
      for (Index s = 0; s < sequence_count; ++s) {
        const MatrixF x = normed(layer.input_norm, stream.sequence(s));
        const VectorD weights = weights_by_the_book(attention, x, sums);
        for (Index n = 0; n < length; ++n) {
          const VectorD here = testing_support::position_of(x, n);
          second += here * here.transpose();
          mean += here;
          received += weights(n) * here * here.transpose();
          received_mean += weights(n) * here;
        }
      }
      const auto tokens = static_cast<double>(sequence_count * length);
      // The inputs are the very same numbers, so only the order of double sums differs.
      EXPECT_LE(relative_error(found.second_moment, second / tokens), 1e-12);
      EXPECT_TRUE(found.second_moment == found.second_moment.transpose());
      EXPECT_LE(relative_error(found.mean, mean / tokens), 1e-12);
      EXPECT_LE(relative_error(found.received_moment, received / tokens), kFloatNoise);
      EXPECT_TRUE(found.received_moment == found.received_moment.transpose());
      EXPECT_LE(relative_error(found.received_mean, received_mean / tokens), 10 * kFloatNoise);
      EXPECT_LE(relative_error(found.mass_square, sums.mass_square / tokens), kFloatNoise);
      EXPECT_LE(relative_error(found.score_effect, sums.score_effect / tokens), 10 * kFloatNoise);
      EXPECT_LE(relative_error(found.distance_mass, sums.distance_mass / tokens), kFloatNoise);
      run_layer(layer, stream);
    }
  }
}

// What latents read in the place of the input where keys are normalised.
TEST(Calibrate, MomentsOfNormalisedHeadsAreTheirs) {
  const TempFolder folder;
  tiny_model({.model_type = "qwen3", .layers = 2}).write(folder / "model");
  const Model model = Model::open(folder / "model");
  const Sequences sequences = random_sequences(2, 150, 60, 50);
  calibrate(model, sequences, folder / "moments.h5", ignore);
  const CalibrationFile file = CalibrationFile::open(folder / "moments.h5");
  EXPECT_EQ(file.header().num_key_value_heads, 2);
  EXPECT_EQ(file.header().head_dim, 8);
  Stream stream(model, sequences);
  for (Index i = 0; i < 2; ++i) {
    const Layer layer = model.layer(i);
    const auto& attention = std::get<GqaAttention>(layer.attention);
    const LayerMoments found = file.layer(i);
    ASSERT_TRUE(found.normed_heads.has_value());
    const MatrixF x = normed(layer.input_norm, stream.hidden());
    const GqaProjections heads = project_unrotated(attention, x);
    const MatrixD q = heads.q.cast<double>();
    MatrixD f(x.rows(), 32);
    f << heads.k.cast<double>(), heads.v.cast<double>();
    const auto tokens = static_cast<double>(x.rows());
    VectorD weights(x.rows());
    for (Index first = 0; first < x.rows(); first += stream.length()) {
      AttentionSums sums(6, stream.length());
      attention_forward(attention, x.middleRows(first, stream.length()),
                        RotaryTable(attention.rotary, stream.length()), &sums);
      weights.segment(first, stream.length()) = weights_of(sums.received);
    }
    const MatrixD weighed = weights.asDiagonal() * f;
    EXPECT_LE(relative_error(found.normed_heads->feature_moment, f.transpose() * weighed / tokens),
              kFloatNoise);
    EXPECT_LE(relative_error(found.normed_heads->feature_mean, weighed.colwise().mean().transpose()), 1e-4);
    EXPECT_LE(relative_error(found.normed_heads->query_mean, q.colwise().mean().transpose()), 1e-4);
    for (Index h = 0; h < 6; ++h) {
      const MatrixD head = q.middleCols(h * 8, 8);
      EXPECT_LE(relative_error(MatrixD(found.normed_heads->query_moment.middleRows(h * 8, 8)),
                               head.transpose() * head / tokens),
                kFloatNoise);
    }
    MatrixD normed_both(x.rows(), 64);
    normed_both << q, weighed.leftCols(16);
    EXPECT_LE(relative_error(found.normed_heads->cross, normed_both.transpose() * x.cast<double>() / tokens),
              kFloatNoise);
    run_layer(layer, stream);
  }
}

TEST(Calibrate, BytesDoNotDependOnTheThreads) {
  const TempFolder folder;
  tiny_model({.model_type = "qwen3", .dtype = DType::bf16}).write(folder / "model");
  const Model model = Model::open(folder / "model");
  const Sequences sequences = random_sequences(3, 90, 100, 50);
  const auto run = [&](int threads) {
    const ThreadCount count(threads);
    const auto path = folder / ("moments" + std::to_string(threads) + ".h5");
    calibrate(model, sequences, path, ignore);
    return read_bytes(path);
  };
  const std::string one = run(1);
  EXPECT_TRUE(run(2) == one);
  EXPECT_TRUE(run(3) == one);
}

TEST(Calibrate, GoesOnAfterAnInterruption) {
  const TempFolder folder;
  tiny_model({.model_type = "qwen3", .layers = 4}).write(folder / "model");
  const Model model = Model::open(folder / "model");
  const Sequences sequences = random_sequences(3, 5, 20, 50);
  calibrate(model, sequences, folder / "whole.h5", ignore);
  const std::string expected = read_bytes(folder / "whole.h5");
  const std::filesystem::path out = folder / "moments.h5";
  const std::filesystem::path work = folder / "moments.h5.partial";
  for (Index layers = 2; layers <= 4; ++layers) {
    for (const bool damage : {false, true}) {
      const auto stop = [&] {
        calibrate(model, sequences, out,
                  [&](Index done, Index) {
                    if (done == layers) {
                      throw Error(ErrorKind::machine, "disk full");
                    }
                  },
                  {.resume = false, .every = 0});
      };
      expect_error(ErrorKind::machine, {"disk full", "moments.h5.partial", "--resume"}, stop);
      EXPECT_FALSE(std::filesystem::exists(out));
      expect_error(ErrorKind::usage, {"moments.h5.partial", "--resume"}, stop);
      const Sequences other = random_sequences(4, 5, 20, 50);
      expect_error(ErrorKind::usage, {"checksum of the tokens"},
                   [&] { calibrate(model, other, out, ignore, {.resume = true}); });
      if (damage) {
        std::filesystem::resize_file(work / "layer-0", 100);
      }
      Index first = 0;
      bool resumed = false;
      calibrate(model, sequences, out, [&](Index done, Index) { first = first == 0 ? done : first; },
                {.resume = true, .taken_up = [&] { resumed = true; }});
      EXPECT_TRUE(resumed);
      EXPECT_EQ(first, damage ? 1 : layers);
      EXPECT_TRUE(read_bytes(out) == expected);
      EXPECT_FALSE(std::filesystem::exists(work));
      std::filesystem::remove(out);
    }
  }
  // Nothing to go on from, and a file that is replaced.
  folder.write("moments.h5", "old");
  calibrate(model, sequences, out, ignore, {.resume = true});
  EXPECT_TRUE(read_bytes(out) == expected);
}

// Each of them is whole, and only in another one's place.
TEST(Calibrate, SavedLayersAreBelievedInTheirOwnPlaceOnly) {
  const TempFolder folder;
  tiny_model({.layers = 4}).write(folder / "model");
  const Model model = Model::open(folder / "model");
  const Sequences sequences = random_sequences(3, 5, 20, 50);
  calibrate(model, sequences, folder / "whole.h5", ignore);
  const std::filesystem::path out = folder / "moments.h5";
  const std::filesystem::path work = folder / "moments.h5.partial";
  const auto stop_at_3 = [](Index done, Index /*all*/) {
    if (done == 3) {
      throw Error(ErrorKind::machine, "disk full");
    }
  };
  EXPECT_THROW(calibrate(model, sequences, out, stop_at_3, {.resume = false, .every = 0}), Error);
  std::filesystem::rename(work / "layer-0", work / "layer-x");
  std::filesystem::rename(work / "layer-1", work / "layer-0");
  std::filesystem::rename(work / "layer-x", work / "layer-1");
  calibrate(model, sequences, out, ignore, {.resume = true});
  EXPECT_TRUE(read_bytes(out) == read_bytes(folder / "whole.h5"));
}

// --context takes another list of the same checkpoint.
TEST(Calibrate, GoesOnWithTheSameFrequenciesOnly) {
  const TempFolder folder;
  testing_support::TinyModel tiny = tiny_model();
  tiny.config["rope_parameters"] = {{"rope_type", "longrope"},
                                    {"rope_theta", 100.0},
                                    {"short_factor", {1, 1, 1, 1}},
                                    {"long_factor", {2, 2, 2, 2}},
                                    {"original_max_position_embeddings", 32}};
  tiny.write(folder / "model");
  const Sequences sequences = random_sequences(3, 2, 20, 50);
  const auto stop_at_2 = [](Index done, Index /*all*/) {
    if (done == 2) {
      throw Error(ErrorKind::machine, "disk full");
    }
  };
  const std::filesystem::path out = folder / "moments.h5";
  EXPECT_THROW(calibrate(Model::open(folder / "model", 32), sequences, out, stop_at_2, {.every = 0}), Error);
  expect_error(ErrorKind::usage, {"checksum of the rotary frequencies"}, [&] {
    calibrate(Model::open(folder / "model", 33), sequences, out, ignore, {.resume = true});
  });
  calibrate(Model::open(folder / "model", 32), sequences, out, ignore, {.resume = true});
  EXPECT_TRUE(std::filesystem::exists(out));
}

TEST(Calibrate, NumbersThatAreNoneAreRefusedByName) {
  const TempFolder folder;
  const std::string names[] = {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"};
  for (const std::string& name : names) {
    testing_support::TinyModel model = tiny_model();
    for (float& value : model.tensors.at(name).values) {
      value = std::numeric_limits<float>::quiet_NaN();
    }
    std::filesystem::remove_all(folder / "model");
    model.write(folder / "model");
    expect_error(ErrorKind::input, {name, "NaN or infinity"}, [&] {
      calibrate(Model::open(folder / "model"), random_sequences(4, 2, 5, 50), folder / "moments.h5", ignore);
    });
    EXPECT_FALSE(std::filesystem::exists(folder / "moments.h5"));
  }
}

TEST(Calibrate, TakesALatentModel) {
  const TempFolder folder;
  testing_support::tiny_latent_model().write(folder / "model");
  const Model model = Model::open(folder / "model");
  const Sequences sequences = random_sequences(4, 2, 5, 50);
  calibrate(model, sequences, folder / "moments.h5", ignore);
  CalibrationFile file = CalibrationFile::open(folder / "moments.h5");
  Stream stream(model, sequences);
  for (Index i = 0; i < model.config().num_hidden_layers; ++i) {
    const Layer layer = model.layer(i);
    const LayerMoments found = file.layer(i);
    const MatrixD x = normed(layer.input_norm, stream.hidden()).cast<double>();
    EXPECT_LE((found.second_moment - x.transpose() * x / 10.0).norm(), 1e-5 * found.second_moment.norm());
    ASSERT_EQ(found.distance_mass.rows(), model.config().num_attention_heads);
    EXPECT_LT(found.distance_mass.rowwise().sum().maxCoeff(), 1);
    EXPECT_GT(found.distance_mass.rowwise().sum().minCoeff(), 0.1);
    run_layer(layer, stream);
  }
}

}  // namespace
}  // namespace relatent
