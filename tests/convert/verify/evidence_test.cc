#include "convert/verify/evidence.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace relatent {
namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

Verification measured() {
  Verification out;
  out.nats = 0.25;
  out.logits.tokens = 100;
  out.logits.mean_kl = 0.5;
  out.logits.rel_logit_error = 0.125;
  out.layers = {{0.1, 0.2}, {0.3, 0.4}};
  return out;
}

std::optional<ConversionReport> report_of(const char* method, const char* dtype = "F32") {
  ConversionReport out;
  out.method = method;
  out.dtype = dtype;
  const Verification found = measured();
  out.probe = Probe{{1, 2}, found.nats, found.logits.mean_kl, found.logits.rel_logit_error, found.layers};
  return out;
}

Outcome within(const Verification& found, const Limits& limits) {
  return function_evidence(found, {}, limits).outcome;
}

TEST(FunctionEvidence, EveryLimitIsLookedAt) {
  EXPECT_EQ(within(measured(), {}), Outcome::passed);
  EXPECT_EQ(within(measured(), {.mean_kl = 0.5, .nats = 0.25, .rel_logit_error = 0.125, .layer_error = 0.3}),
            Outcome::passed);
  EXPECT_EQ(within(measured(), {.mean_kl = 0.49}), Outcome::failed);
  EXPECT_EQ(within(measured(), {.nats = 0.24}), Outcome::failed);
  EXPECT_EQ(within(measured(), {.rel_logit_error = 0.12}), Outcome::failed);
  const Evidence layer = function_evidence(measured(), {}, {.layer_error = 0.29});
  ASSERT_EQ(layer.findings.size(), 1U);
  EXPECT_NE(layer.findings[0].find("layer 1"), std::string::npos) << layer.findings[0];
}

TEST(FunctionEvidence, GainsCountLikeLosses) {
  Verification better = measured();
  better.nats = -0.25;
  EXPECT_EQ(within(better, {.nats = 0.25}), Outcome::passed);
  EXPECT_EQ(within(better, {.nats = 0.24}), Outcome::failed);
}

TEST(FunctionEvidence, WhatIsNotANumberKeepsNoLimit) {
  Verification broken = measured();
  broken.logits.mean_kl = not_a_number;
  EXPECT_EQ(within(broken, {.mean_kl = 1e9}), Outcome::failed);
  broken = measured();
  broken.layers[1].attention_rel_error = not_a_number;
  EXPECT_EQ(within(broken, {.layer_error = 1e9}), Outcome::failed);
  broken = measured();
  broken.logits.non_finite = 1;
  EXPECT_EQ(within(broken, {}), Outcome::failed);
}

TEST(FunctionEvidence, DevicesAreOneUpToRounding) {
  DeviceVerification devices;
  devices.tp = 2;
  devices.logits.rel_logit_error = 1e-6;
  EXPECT_EQ(function_evidence(measured(), devices, {}).outcome, Outcome::passed);
  devices.logits.rel_logit_error = 1e-3;
  EXPECT_EQ(function_evidence(measured(), devices, {}).outcome, Outcome::failed);
}

TEST(Limits, LosslessConversionsBringTheirOwn) {
  EXPECT_EQ(with_defaults({}, report_of("lossless")).rel_logit_error, rounding_error(DType::f32));
  EXPECT_EQ(with_defaults({}, report_of("lossless", "BF16")).rel_logit_error, rounding_error(DType::bf16));
  EXPECT_EQ(with_defaults({.rel_logit_error = 0.5}, report_of("lossless")).rel_logit_error, 0.5);
  EXPECT_EQ(with_defaults({}, report_of("relatent")).rel_logit_error, std::nullopt);
  EXPECT_EQ(with_defaults({}, {}).rel_logit_error, std::nullopt);
}

TEST(PredictionEvidence, EveryFigureIsReproduced) {
  const auto report = report_of("relatent");
  EXPECT_EQ(prediction_evidence(report, measured()).outcome, Outcome::passed);
  const auto changed = [&](const auto& change) {
    Verification found = measured();
    change(found);
    return prediction_evidence(report, found).findings.size();
  };
  EXPECT_EQ(changed([](Verification& v) { v.layers[1].attention_rel_error *= 1.001; }), 0U);
  EXPECT_EQ(changed([](Verification& v) { v.layers[1].attention_rel_error *= 1.01; }), 1U);
  EXPECT_EQ(changed([](Verification& v) { v.layers[0].residual_rel_error *= 0.98; }), 1U);
  EXPECT_EQ(changed([](Verification& v) { v.nats -= 0.01; }), 1U);
  EXPECT_EQ(changed([](Verification& v) { v.logits.mean_kl = not_a_number; }), 1U);
  EXPECT_EQ(changed([](Verification& v) { v.logits.rel_logit_error = 0; }), 1U);
}

TEST(PredictionEvidence, SaysWhyItIsNotChecked) {
  EXPECT_EQ(prediction_evidence({}, {}).outcome, Outcome::not_checked);
  auto report = report_of("relatent");
  EXPECT_EQ(prediction_evidence(report, {}).outcome, Outcome::failed) << "tokens of another model";
  Verification found = measured();
  found.layers.pop_back();
  EXPECT_EQ(prediction_evidence(report, found).outcome, Outcome::failed);
  report->probe.reset();
  EXPECT_EQ(prediction_evidence(report, {}).outcome, Outcome::not_checked);
}

TEST(Coverage, CountsRowsAndPositions) {
  ModelConfig config;
  config.vocab_size = 10;
  config.max_position_embeddings = 64;
  const Coverage found = coverage_of({2, 3, {1, 2, 1, 9, 9, 0}}, config);
  EXPECT_EQ(found.tokens_used, 4);
  EXPECT_EQ(found.vocab_size, 10);
  EXPECT_EQ(found.positions, 3);
  EXPECT_EQ(found.max_position_embeddings, 64);
}

AllEvidence all_passed() {
  AllEvidence out;
  out.measured = measured();
  return out;
}

TEST(VerdictOf, WorstComesFirst) {
  const auto lossless = report_of("lossless");
  AllEvidence all = all_passed();
  EXPECT_EQ(verdict_of(all, lossless).text, "proved");
  EXPECT_EQ(verdict_of(all, report_of("relatent")).text, "close as measured");
  EXPECT_TRUE(verdict_of(all, {}).holds);
  EXPECT_NE(verdict_of(all, {}).why.find(kReportName), std::string::npos);
  all.function = {Outcome::failed, {"too far"}};
  EXPECT_EQ(verdict_of(all, lossless).text, "further than the limits allow");
  all.prediction = {Outcome::failed, {"another layer 1", "and another"}};
  EXPECT_EQ(verdict_of(all, lossless).text, "not what was written");
  EXPECT_EQ(verdict_of(all, lossless).why, "another layer 1 (and 1 more)");
  all.structure.findings = {"another tokenizer"};
  EXPECT_EQ(verdict_of(all, lossless).why, "another tokenizer");
  all.measured.logits.non_finite = 2;
  EXPECT_EQ(verdict_of(all, lossless).text, "broken");
  all.measured.logits.non_finite = 0;
  all.structure.not_finite = {"a tensor"};
  EXPECT_EQ(verdict_of(all, lossless).text, "broken");
  EXPECT_FALSE(verdict_of(all, lossless).holds);
}

TEST(VerdictOf, JsonNamesEveryKind) {
  AllEvidence all = all_passed();
  all.structure.findings = {"another tokenizer"};
  all.prediction = {Outcome::not_checked, {"no tokens"}};
  const nlohmann::ordered_json json = to_json(all);
  EXPECT_EQ(json["structure"]["verdict"], "failed");
  EXPECT_EQ(json["structure"]["findings"][0], "another tokenizer");
  EXPECT_EQ(json["finiteness"]["verdict"], "passed");
  EXPECT_EQ(json["function"]["verdict"], "passed");
  EXPECT_EQ(json["prediction"]["verdict"], "not checked");
  EXPECT_TRUE(json["coverage"].contains("tokens_used"));
}

}  // namespace
}  // namespace relatent
