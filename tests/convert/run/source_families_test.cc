// Families by what they have beside Llama's parts: conversions of small random checkpoints.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "convert/verify/structure.h"
#include "tests/support/convert_fixture.h"
#include "tests/support/expect_error.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::tiny_model;
using testing_support::TinyModel;
using testing_support::TinyOptions;

class SourceFamilies : public testing_support::ConvertTest {
 protected:
  void expect_structure() const {
    std::vector<std::string> unreadable;
    const Model to = Model::open(output());
    const Structure found = check_structure(Model::open(source()), to, find_report(to, unreadable));
    EXPECT_TRUE(unreadable.empty());
    EXPECT_EQ(found.findings, std::vector<std::string>{});
  }
  // Fewer numbers than the source, written both without and with calibration.
  void expect_half(ConvertOptions options) {
    options.rank = 20;
    options.rope_dim = 4;
    for (const Method method : {Method::weights_only, Method::relatent}) {
      SCOPED_TRACE(method_name(method));
      options.method = method;
      if (method == Method::relatent) {
        options.calibration = calibrated();
      }
      run(options);
      expect_structure();
      const double error = verified().logits.rel_logit_error;
      EXPECT_GT(error, 0);
      EXPECT_LT(error, 1);
    }
  }
};

class EachFamily : public SourceFamilies, public testing::WithParamInterface<TinyOptions> {};

TEST_P(EachFamily, LosslessLosesNothing) {
  for (const auto& [form, branches] : {std::pair{"mla", 1}, {"gla", 2}, {"tpla", 2}, {"mlra", 4}}) {
    SCOPED_TRACE(form);
    ConvertOptions options = write(GetParam());
    options.form = form;
    if (branches > 1) {
      options.branches = branches;
    }
    run(options);
    expect_structure();
    EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
  }
}

TEST_P(EachFamily, HalfOfTheCache) {
  expect_half(write(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(
    All, EachFamily,
    testing::Values(TinyOptions{.model_type = "granite"}, TinyOptions{.model_type = "granite", .tied = true},
                    TinyOptions{.model_type = "glm4"},
                    TinyOptions{.model_type = "glm4", .q_bias = true, .kv_bias = true},
                    TinyOptions{.model_type = "olmo2"}, TinyOptions{.model_type = "smollm3"},
                    TinyOptions{.model_type = "smollm3", .q_bias = true, .kv_bias = true, .o_bias = true}),
    [](const testing::TestParamInfo<TinyOptions>& which) {
      const TinyOptions& o = which.param;
      return o.model_type + (o.q_bias ? "_biases" : "") + (o.tied ? "_tied" : "");
    });

// Latents of a layer that does not rotate read all of its keys, whatever the rotary key's size.
TEST_F(SourceFamilies, UnrotatedLayersAreLatentsToo) {
  ConvertOptions options = write({.model_type = "smollm3"});
  run(options);
  const Model converted = Model::open(output());
  EXPECT_EQ(converted.config().still_layers().layers(), std::vector<Index>{1});
  EXPECT_TRUE(converted.config().is_latent(1));
  for (const float frequency : converted.config().rotary_of(1).inv_freq) {
    EXPECT_EQ(frequency, 0);
  }
  // It makes a difference.
  TinyModel rotated = tiny_model({.model_type = "smollm3"});
  rotated.config["no_rope_layers"] = {1, 1, 1};
  rotated.write(source());
  EXPECT_GT(verified().logits.rel_logit_error, 0.01);

  // All layers but that one: it stays grouped-query attention, by a list of its own.
  options = write({.model_type = "smollm3"});
  options.layers = "0,2";
  run(options);
  EXPECT_FALSE(Model::open(output()).config().is_latent(1));
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
  options.layers = "1";
  expect_error(ErrorKind::usage, {"--layers", "one layer at least that rotates"}, [&] { run(options); });
}

TEST_F(SourceFamilies, WhatLayoutsOfOthersHaveNoPlaceFor) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"granite", "residual_multiplier"},
      {"smollm3", "without a rotary embedding (1)"},
      {"glm4", "norms behind"},
      {"olmo2", "norms behind"}};
  for (const auto& [model_type, why] : cases) {
    ConvertOptions options = write({.model_type = model_type});
    for (const char* engine : {"deepseek", "gguf"}) {
      options.engine = engine;
      expect_error(ErrorKind::usage, {"--engine", engine, why, "--engine relatent"}, [&] { run(options); });
    }
  }
  for (const auto& [model_type, key] :
       {std::pair{"smollm3", "no_rope_layers"}, {"glm4", "partial_rotary_factor"}}) {
    ConvertOptions options = write({.model_type = model_type});
    options.calibration = calibrated();
    options.method = Method::transmla;
    options.rank = 10;
    options.rope_dim = 8;
    expect_error(ErrorKind::input, {key, "--method transmla", "--method relatent"}, [&] { run(options); });
  }
}

}  // namespace
}  // namespace relatent
