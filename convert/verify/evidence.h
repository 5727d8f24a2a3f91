// What verify looks at, one kind of evidence beside the other, and what all of it comes to.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "convert/verify/conversion_report.h"
#include "convert/verify/structure.h"
#include "convert/verify/verify.h"

namespace relatent {

enum class Outcome { passed, failed, not_checked };

// Passed where there is nothing to say.
Outcome outcome_of(const std::vector<std::string>& findings);

struct Evidence {
  Outcome outcome = Outcome::passed;
  // A sentence for everything that failed, or why it was not checked.
  std::vector<std::string> findings;
};

// How far the converted model may be from its source on the tokens that are run; nothing is not looked at.
struct Limits {
  std::optional<double> mean_kl{};
  std::optional<double> nats{};             // lost or gained: what is better than its source was changed too
  std::optional<double> rel_logit_error{};  // of the logits of all tokens together
  std::optional<double> layer_error{};      // attention_rel_error of every layer
};

// The relative logit error that rounding alone makes, in a converted checkpoint of that dtype.
double rounding_error(DType dtype);

// Limits that the method itself sets where none was given: what a lossless conversion wrote is its source.
Limits with_defaults(Limits given, const std::optional<ConversionReport>& report);

// Whether every figure keeps its limit; one that is not a number keeps none.
// devices: the run by several devices, where there was one, which must be the run by one up to rounding.
Evidence function_evidence(const Verification& found, const std::optional<DeviceVerification>& devices,
                           const Limits& limits);

// Whether the report's tokens give what convert measured on them. found: nothing when they were not run.
Evidence prediction_evidence(const std::optional<ConversionReport>& report,
                             const std::optional<Verification>& found);

// What the tokens never reached, of which the figures say nothing.
struct Coverage {
  Index tokens_used = 0;  // of the vocabulary
  Index vocab_size = 0;
  Index positions = 0;
  Index max_position_embeddings = 0;
};
Coverage coverage_of(const Sequences& sequences, const ModelConfig& config);

struct Verdict {
  bool holds = false;  // nothing failed
  std::string text;    // "proved", "close as measured", ...
  std::string why;
};

struct AllEvidence {
  Structure structure;
  Verification measured;
  std::optional<DeviceVerification> devices;
  Evidence function;
  Evidence prediction;
  Coverage coverage;
};

Verdict verdict_of(const AllEvidence& all, const std::optional<ConversionReport>& report);

// The member "evidence" of `verify --json`.
nlohmann::ordered_json to_json(const AllEvidence& all);

}  // namespace relatent
