#include "convert/verify/evidence.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

// A figure measured again: the same program gives the same bytes, and another machine's sums differ in their
// last digits, which the layers behind magnify.
constexpr double noise = 1e-4;           // of what is near 0
constexpr double relative_noise = 5e-3;  // of what is not
// Relative logit error that another order of the sums over heads makes at most.
constexpr double device_rounding = 1e-4;

bool is_reproduced(double expected, double found) {
  if (!std::isfinite(expected) || !std::isfinite(found)) {
    return !std::isfinite(expected) && !std::isfinite(found);
  }
  return std::abs(expected - found) <= noise + relative_noise * std::abs(expected);
}

std::string number(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.6g", value);
  return text.data();
}

const char* name_of(Outcome outcome) {
  switch (outcome) {
    case Outcome::passed:
      return "passed";
    case Outcome::failed:
      return "failed";
    case Outcome::not_checked:
      return "not checked";
  }
  return "";
}

Json to_json(const Evidence& evidence) {
  return {{"verdict", name_of(evidence.outcome)}, {"findings", evidence.findings}};
}

Evidence from_findings(std::vector<std::string> findings) {
  const Outcome outcome = outcome_of(findings);
  return {outcome, std::move(findings)};
}

// "the first of them (and 3 more)"
std::string first_of(const std::vector<std::string>& findings) {
  return findings.size() < 2 ? findings.front()
                             : findings.front() + " (and " + std::to_string(findings.size() - 1) + " more)";
}

bool is_lossless(const std::optional<ConversionReport>& report) {
  return report && report->method == "lossless";
}

}  // namespace

Outcome outcome_of(const std::vector<std::string>& findings) {
  return findings.empty() ? Outcome::passed : Outcome::failed;
}

double rounding_error(DType dtype) {
  // Measured of lossless conversions of a llama, a qwen2 and SmolLM2-135M: at most 1.0e-6, 1.4e-4 and 1.6e-3.
  switch (dtype) {
    case DType::bf16:
      return 1e-2;
    case DType::f16:
      return 1e-3;
    default:
      return 1e-5;
  }
}

Limits with_defaults(Limits given, const std::optional<ConversionReport>& report) {
  if (is_lossless(report) && !given.rel_logit_error) {
    given.rel_logit_error = rounding_error(dtype_from_safetensors(report->dtype).value_or(DType::f32));
  }
  return given;
}

Evidence function_evidence(const Verification& found, const std::optional<DeviceVerification>& devices,
                           const Limits& limits) {
  std::vector<std::string> out;
  const auto check = [&](const std::string& what, double value, const std::optional<double>& limit) {
    if (limit && !(value <= *limit)) {
      out.push_back(what + " " + number(value) + " is above the limit " + number(*limit));
    }
  };
  if (found.logits.non_finite > 0) {
    out.push_back("logits are NaN or infinite at " + std::to_string(found.logits.non_finite) + " positions");
  }
  check("mean KL", found.logits.mean_kl, limits.mean_kl);
  check("nats lost", found.nats, limits.nats);
  check("nats gained, as no conversion does,", -found.nats, limits.nats);
  check("relative logit error", found.logits.rel_logit_error, limits.rel_logit_error);
  for (std::size_t i = 0; i < found.layers.size(); ++i) {
    check("layer " + std::to_string(i) + ": attention error", found.layers[i].attention_rel_error,
          limits.layer_error);
  }
  if (devices) {
    check("run by " + std::to_string(devices->tp) + " devices against one: relative logit error",
          devices->logits.rel_logit_error, device_rounding);
  }
  return from_findings(std::move(out));
}

Evidence prediction_evidence(const std::optional<ConversionReport>& report,
                             const std::optional<Verification>& found) {
  if (!report) {
    return {Outcome::not_checked, {std::string("there is no ") + kReportName}};
  }
  if (!report->probe) {
    return {Outcome::not_checked, {"convert measured nothing: it had no calibration tokens to measure on"}};
  }
  const Probe& probe = *report->probe;
  if (!found || found->layers.size() != probe.layers.size()) {
    return {Outcome::failed, {std::string(kReportName) + ": what was measured is not of this model"}};
  }
  std::vector<std::string> out;
  const auto check = [&](const std::string& what, double expected, double now) {
    if (!is_reproduced(expected, now)) {
      out.push_back(what + " is " + number(now) + " on the tokens on which convert measured " +
                    number(expected));
    }
  };
  for (std::size_t i = 0; i < probe.layers.size(); ++i) {
    const std::string layer = "layer " + std::to_string(i) + ": ";
    check(layer + "attention error", probe.layers[i].attention_rel_error,
          found->layers[i].attention_rel_error);
    check(layer + "residual error", probe.layers[i].residual_rel_error, found->layers[i].residual_rel_error);
  }
  check("relative logit error", probe.rel_logit_error, found->logits.rel_logit_error);
  check("mean KL", probe.mean_kl, found->logits.mean_kl);
  check("loss in nats", probe.nats, found->nats);
  return from_findings(std::move(out));
}

Coverage coverage_of(const Sequences& sequences, const ModelConfig& config) {
  Coverage out;
  std::vector<bool> used(static_cast<std::size_t>(config.vocab_size));
  for (const std::int32_t id : sequences.tokens) {
    used[static_cast<std::size_t>(id)] = true;
  }
  out.tokens_used = static_cast<Index>(std::count(used.begin(), used.end(), true));
  out.vocab_size = config.vocab_size;
  out.positions = sequences.length;
  out.max_position_embeddings = config.max_position_embeddings;
  return out;
}

Verdict verdict_of(const AllEvidence& all, const std::optional<ConversionReport>& report) {
  const Structure& files = all.structure;
  if (!files.not_finite.empty()) {
    return {false, "broken", first_of(files.not_finite)};
  }
  if (all.measured.logits.non_finite > 0 || (all.devices && all.devices->logits.non_finite > 0)) {
    const Index positions =
        std::max(all.measured.logits.non_finite, all.devices ? all.devices->logits.non_finite : Index{0});
    return {false, "broken", "logits are NaN or infinite at " + std::to_string(positions) + " positions"};
  }
  if (!files.findings.empty()) {
    return {false, "not what was written", first_of(files.findings)};
  }
  if (all.prediction.outcome == Outcome::failed) {
    return {false, "not what was written", first_of(all.prediction.findings)};
  }
  if (all.function.outcome == Outcome::failed) {
    return {false, "further than the limits allow", first_of(all.function.findings)};
  }
  if (!report) {
    return {true, "close as measured",
            std::string("on these tokens; without ") + kReportName +
                " nothing says whether the converted tensors are what was written"};
  }
  if (is_lossless(report)) {
    return {
        true, "proved",
        "every file is what was written, and the function is the source's up to rounding on these tokens"};
  }
  return {true, "close as measured", "every file is what was written, and what it loses is measured above"};
}

Json to_json(const AllEvidence& all) {
  const Structure& s = all.structure;
  Json structure = to_json(from_findings(s.findings));
  structure["copied"] = s.copied;
  structure["cast"] = s.cast;
  structure["converted"] = s.converted;
  structure["checked"] = s.checked;
  return {{"structure", std::move(structure)},
          {"finiteness", to_json(from_findings(s.not_finite))},
          {"function", to_json(all.function)},
          {"prediction", to_json(all.prediction)},
          {"coverage",
           {{"tokens_used", all.coverage.tokens_used},
            {"vocab_size", all.coverage.vocab_size},
            {"positions", all.coverage.positions},
            {"max_position_embeddings", all.coverage.max_position_embeddings}}}};
}

}  // namespace relatent
