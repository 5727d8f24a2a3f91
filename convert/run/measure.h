// What a finished conversion lost, measured from its files on calibration tokens before they get their name.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "convert/compute/statistics.h"
#include "convert/model/model.h"
#include "convert/verify/conversion_report.h"
#include "formats/npy.h"

namespace relatent {

struct Measurement {
  bool held_out = false;  // no fit has seen the tokens
  LogitComparison logits;
  std::optional<Probe> probe{};  // not kept in a journal

  double nats() const { return logits.converted_nll - logits.source_nll; }
};

// Above this a result is of no use, and above that people will notice what was lost, in nats.
inline constexpr double unusable_nats = 1;
inline constexpr double noticeable_nats = 0.25;

// Runs the source and the checkpoint in `folder` side by side. Throws Error as Model::open does.
Measurement measure(const Model& source, const std::filesystem::path& folder, const Sequences& sequences,
                    bool held_out);

// "lost 0.2100 nats on 2046 held-out calibration tokens: perplexity 8.38 -> 10.34, ..."
std::string in_words(const Measurement& measured);

// What is said of a loss beyond the limits above; empty below them. reasons: what may have caused it and what
// to try, in sentences without a full stop.
std::string loss_warning(const Measurement& measured, const std::vector<std::string>& reasons);

// For a journal, and back.
std::string to_text(const Measurement& measured);
std::optional<Measurement> measurement_from(const std::string& text);

}  // namespace relatent
