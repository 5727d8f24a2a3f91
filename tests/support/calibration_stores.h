// Calibration stores of random moments.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <random>
#include <vector>

#include "formats/calibration_store.h"

namespace relatent::testing_support {

inline constexpr std::int64_t kHeads = 2;
inline constexpr std::int64_t kLength = 7;

inline MatrixD random_matrix(Index rows, Index columns, std::mt19937& random) {
  std::normal_distribution<double> normal;
  return MatrixD::NullaryExpr(rows, columns, [&] { return normal(random); });
}

inline CalibrationHeader header_of(std::int64_t hidden, std::int64_t layers) {
  return {.source_fingerprint = "00112233445566778899aabbccddeeff",
          .source_config = "{\"model_type\": \"llama\", \"é\": 1}",
          .model_type = "llama",
          .hidden_size = hidden,
          .num_hidden_layers = layers,
          .num_attention_heads = kHeads,
          .compute = "bfloat16"};
}

inline Sequences some_sequences() {
  Sequences sequences{.count = 3, .length = kLength, .tokens = {}};
  for (int i = 0; i < 3 * kLength; ++i) {
    sequences.tokens.push_back(i * i);
  }
  return sequences;
}

inline LayerMoments random_layer(std::int64_t hidden, std::mt19937& random) {
  LayerMoments moments;
  moments.tokens = 21 + static_cast<std::int64_t>(random() % 100);
  const MatrixD x = random_matrix(hidden, 30, random);
  moments.second_moment = x * x.transpose() / 30;
  moments.second_moment.triangularView<Eigen::StrictlyUpper>() = moments.second_moment.transpose();
  moments.mean = x.rowwise().mean();
  moments.received_moment = moments.second_moment * 1.25;
  moments.received_mean = moments.mean * 0.5;
  moments.mass_square = random_matrix(kHeads, 1, random).cwiseAbs2().cwiseMin(0.9).array() + 0.01;
  moments.score_effect = random_matrix(kHeads, 1, random).cwiseAbs();
  moments.distance_mass = random_matrix(kHeads, kLength, random).cwiseAbs();
  moments.distance_mass.array().colwise() /= moments.distance_mass.rowwise().sum().array().eval();
  return moments;
}

// Writes a store and returns what it holds, layer by layer.
inline std::vector<LayerMoments> write_store(const std::filesystem::path& path, std::int64_t hidden,
                                             std::int64_t layers, unsigned seed = 1) {
  std::filesystem::remove(path);
  std::mt19937 random(seed);
  std::vector<LayerMoments> all;
  CalibrationWriter writer(path, header_of(hidden, layers), some_sequences());
  for (std::int64_t i = 0; i < layers; ++i) {
    all.push_back(random_layer(hidden, random));
    writer.add_layer(all.back());
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  writer.finish();
  return all;
}

// Of a model with two key/value heads of three numbers.
inline CalibrationHeader normed_header(std::int64_t layers) {
  CalibrationHeader out = header_of(5, layers);
  out.num_key_value_heads = 2;
  out.head_dim = 3;
  return out;
}

inline LayerMoments random_normed_layer(std::mt19937& random) {
  LayerMoments out = random_layer(5, random);
  const auto second = [](const MatrixD& rows) {
    MatrixD moment = rows * rows.transpose() / 30;
    moment.triangularView<Eigen::StrictlyUpper>() = moment.transpose();
    return moment;
  };
  const MatrixD features = random_matrix(12, 30, random);
  const MatrixD queries = random_matrix(kHeads * 3, 30, random);
  NormedHeadMoments& heads = out.normed_heads.emplace();
  heads.feature_moment = second(features);
  heads.feature_mean = features.rowwise().mean();
  heads.query_moment.resize(kHeads * 3, 3);
  for (Index h = 0; h < kHeads; ++h) {
    heads.query_moment.middleRows(h * 3, 3) = second(queries.middleRows(h * 3, 3));
  }
  heads.query_mean = queries.rowwise().mean();
  heads.cross = random_matrix(kHeads * 3 + 6, 5, random) * 0.01;
  return out;
}

}  // namespace relatent::testing_support
