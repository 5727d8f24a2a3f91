// Checkpoints that normalise queries and keys: latents read the normalised heads.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "convert/shard/shard.h"
#include "convert/verify/structure.h"
#include "convert/verify/verify.h"
#include "tests/support/convert_fixture.h"
#include "tests/support/expect_error.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::Conversion;
using testing_support::expect_error;
using testing_support::ignore;
using testing_support::kFloatNoise;
using testing_support::layer_name;
using testing_support::random_sequences;
using testing_support::read_bytes;
using testing_support::small;
using testing_support::TinyOptions;

class QkNormTest : public testing_support::ConvertTest {
 protected:
  static TinyOptions qwen3(bool bias = false, DType dtype = DType::f32) {
    return {.model_type = "qwen3", .q_bias = bias, .kv_bias = bias, .o_bias = bias, .dtype = dtype};
  }
  void expect_devices_agree(Index tp) const {
    const DeviceVerification found =
        verify_devices(Model::open(output()), random_sequences(2, 2, 40, 50), tp, ignore);
    EXPECT_LE(found.logits.rel_logit_error, kFloatNoise);
  }
};

struct FormOfBranches {
  const char* form;
  Index branches;
};

TEST_F(QkNormTest, LosslessLosesNothingInAnyForm) {
  for (const bool bias : {false, true}) {
    for (const FormOfBranches& form :
         {FormOfBranches{"mla", 1}, {"gla", 2}, {"tpla", 2}, {"mlra", 4}, {"gtpla", 4}}) {
      if (find_form(form.form) == nullptr) {
        continue;
      }
      SCOPED_TRACE(std::string(form.form) + (bias ? " biases" : ""));
      ConvertOptions options = write(qwen3(bias));
      options.form = form.form;
      if (form.branches > 1) {
        options.branches = form.branches;
      }
      run(options);
      const Verification found = verified();
      EXPECT_LE(found.logits.rel_logit_error, kFloatNoise);
      EXPECT_EQ(Model::open(output()).config().latent->normed_heads->inputs(), 32);
      if (form.branches > 1) {
        expect_devices_agree(2);
      }
    }
  }
}

TEST_F(QkNormTest, EverythingKeptReturnsTheSource) {
  ConvertOptions options = write(qwen3(true));
  options.method = Method::weights_only;
  options.rank = 32;
  options.rope_dim = 16;
  run(options);
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
  options.calibration = calibrated();
  options.method = Method::relatent;
  run(options);
  EXPECT_LE(verified().logits.rel_logit_error, 10 * kFloatNoise);
}

TEST_F(QkNormTest, FitsBringTheLogitsNearer) {
  ConvertOptions options = small(write(qwen3()), Method::weights_only);
  run(options);
  const double blind = verified().logits.rel_logit_error;
  options.calibration = calibrated(DType::f32, 96);
  run(options);
  const double closed = verified().logits.rel_logit_error;
  options.method = Method::relatent;
  run(options);
  const double fitted = verified().logits.rel_logit_error;
  EXPECT_LT(closed, blind);
  EXPECT_LT(fitted, closed);
  for (const auto& [form, branches] : {std::pair{"gla", 2}, {"tpla", 2}}) {
    options.form = form;
    options.branches = branches;
    options.key_rank = std::string(form) == "tpla" ? std::optional<Index>(4) : std::nullopt;
    run(options);
    EXPECT_LT(verified().logits.rel_logit_error, 1.2 * blind) << form;
    expect_devices_agree(2);
  }
}

TEST_F(QkNormTest, SizesOfABudgetAreTried) {
  TinyOptions sample = qwen3();
  sample.head_dim = 16;
  ConvertOptions options = write(sample);
  options.method = Method::relatent;
  options.calibration = calibrated();
  options.kv_budget = 0.5;
  const ConvertReport found = run(options);
  EXPECT_EQ(found.kv_rank + found.rope_dim, 32);
  EXPECT_LT(verified().logits.rel_logit_error, 0.5);
}

// Projections and norms are the source's, byte for byte, and verify knows it.
TEST_F(QkNormTest, WhatIsKeptIsTheSources) {
  run(write(qwen3(true, DType::bf16)));
  const Model from = Model::open(source());
  const Model to = Model::open(output());
  for (const char* name : {"q_proj.weight", "q_proj.bias", "q_norm.weight", "k_proj.weight", "k_proj.bias",
                           "k_norm.weight", "v_proj.weight", "v_proj.bias"}) {
    const std::string full = layer_name(1, std::string("self_attn.") + name);
    const std::span<const std::byte> a = from.checkpoint().bytes(full);
    const std::span<const std::byte> b = to.checkpoint().bytes(full);
    EXPECT_TRUE(std::ranges::equal(a, b)) << name;
  }
  std::vector<std::string> unreadable;
  const Structure found = check_structure(from, to, find_report(to, unreadable));
  EXPECT_EQ(found.findings, std::vector<std::string>());
}

TEST_F(QkNormTest, BytesDoNotDependOnTheThreads) {
  ConvertOptions options = small(write(qwen3()), Method::relatent);
  options.calibration = calibrated();
  expect_same_bytes(options, {1, 3});
}

TEST_F(QkNormTest, ShardsMergeByteForByte) {
  ConvertOptions options = write(qwen3(true, DType::bf16));
  options.form = "gla";
  options.branches = 2;
  run(options);
  ShardOptions cut;
  cut.source = output();
  cut.output = folder_ / "shards";
  cut.tp = 2;
  write_shards(cut, ignore);
  merge_shards(folder_ / "shards", folder_ / "merged", ignore);
  EXPECT_EQ(read_bytes(folder_ / "merged/model.safetensors"), read_bytes(output() / "model.safetensors"));
}

// An engine without a place for the norms says so, or takes linear maps and says what they miss.
TEST_F(QkNormTest, EnginesWithoutNormsTakeLinearMapsOrRefuse) {
  ConvertOptions options = small(write(qwen3()), Method::relatent);
  EXPECT_EQ(open_inputs(write(qwen3())).engine->name(), "relatent");
  options.calibration = calibrated(DType::f32, 24);
  options.engine = "mlra";
  options.form = "mlra";
  options.branches = 4;
  expect_error(ErrorKind::usage, {"--engine mlra", "norms on queries and keys", "--engine relatent"},
               [&] { Conversion{options}; });
  options.form = "mla";
  options.branches = {};
  options.engine = "deepseek";
  options.rope_dim = 4;
  Conversion conversion(options);
  ASSERT_FALSE(conversion.plan().warnings.empty());
  EXPECT_NE(conversion.plan().warnings.back().find("linear maps stand in for them"), std::string::npos);
  fs::remove_all(options.output);
  conversion.run(ignore);
  EXPECT_EQ(Model::open(output()).config().model_type, "deepseek_v3");
  EXPECT_LT(verified().logits.rel_logit_error, 1);
}

TEST_F(QkNormTest, ACalibrationWithoutNormalisedHeadsIsRefused) {
  write(TinyOptions{});
  const fs::path plain = calibrated();
  ConvertOptions options = small(write(qwen3()), Method::relatent);
  options.calibration = plain;
  expect_error(ErrorKind::input, {"moments.h5", "num_key_value_heads", "relatent calibrate"},
               [&] { open_inputs(options); });
}

TEST_F(QkNormTest, ConfigsSayWhatIsWrong) {
  run(write(qwen3()));
  const auto altered = [&](const char* key, const nlohmann::ordered_json& value) {
    nlohmann::ordered_json config = Model::open(output()).checkpoint().config();
    config[key] = value;
    return config;
  };
  const auto refuse = [&](const char* key, const nlohmann::ordered_json& value, const char* expected) {
    expect_error(ErrorKind::input, {"config.json", key, expected},
                 [&] { parse_config(altered(key, value), "config.json"); });
  };
  refuse("latent_features", "scores", "normed_heads");
  refuse("qk_norm", "row", "head or width");
  refuse("num_key_value_heads", 4, "a divisor");
  refuse("normed_head_dim", 0, "positive");
  refuse("q_lora_rank", 8, "null");
  nlohmann::ordered_json normed = altered("latent_norm", "replicated");
  normed["latent_norm_rank"] = 8;
  expect_error(ErrorKind::input, {"latent_norm", "normed_heads"},
               [&] { parse_config(normed, "config.json"); });
}

}  // namespace
}  // namespace relatent
