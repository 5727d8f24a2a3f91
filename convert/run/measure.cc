#include "convert/run/measure.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include "convert/verify/verify.h"
#include "formats/resume.h"
#include "linalg/stages.h"

namespace relatent {

Measurement measure(const Model& source, const std::filesystem::path& folder, const Sequences& sequences,
                    bool held_out) {
  const Stage stage("measure");
  const Model written = Model::open(folder);
  const Sequences probe = probe_of(sequences);
  const std::vector<Verification> found = verify(source, written, {sequences, probe});
  return {held_out, found.front().logits, probe_from(probe, found.back())};
}

std::string in_words(const Measurement& measured) {
  const LogitComparison& logits = measured.logits;
  std::array<char, 256> text{};
  std::snprintf(text.data(), text.size(),
                "lost %.4f nats on %lld %scalibration tokens%s: perplexity %.4g -> %.4g, same most likely "
                "token %.1f %%",
                measured.nats(), static_cast<long long>(logits.tokens), measured.held_out ? "held-out " : "",
                measured.held_out ? "" : " that the fits have seen", std::exp(logits.source_nll),
                std::exp(logits.converted_nll), 100 * logits.top1_agreement);
  return text.data();
}

std::string loss_warning(const Measurement& measured, const std::vector<std::string>& reasons) {
  if (measured.logits.non_finite > 0) {
    return "THE RESULT IS NOT USABLE: its logits are NaN or infinite at " +
           std::to_string(measured.logits.non_finite) + " positions";
  }
  if (measured.nats() <= noticeable_nats) {
    return "";
  }
  std::array<char, 256> text{};
  std::snprintf(text.data(), text.size(),
                measured.nats() <= unusable_nats
                    ? "%.2f nats are lost, which people who use the model will notice (perplexity %.4g "
                      "instead of %.4g)"
                    : "THE RESULT IS NOT USABLE: %.2f nats are lost (perplexity %.4g instead of %.4g)",
                measured.nats(), std::exp(measured.logits.converted_nll),
                std::exp(measured.logits.source_nll));
  std::string out = text.data();
  for (std::size_t i = 0; i < reasons.size(); ++i) {
    out += (i == 0 ? ": " : "; ") + reasons[i];
  }
  return out;
}

std::string to_text(const Measurement& measured) {
  const LogitComparison& l = measured.logits;
  std::string out =
      (measured.held_out ? "1 " : "0 ") + std::to_string(l.tokens) + " " + std::to_string(l.non_finite);
  for (const double number : {l.source_nll, l.converted_nll, l.mean_kl, l.max_kl, l.top1_agreement,
                              l.max_abs_logit_diff, l.rel_logit_error}) {
    out += " " + exact_text(number);
  }
  return out;
}

std::optional<Measurement> measurement_from(const std::string& text) {
  Measurement out;
  LogitComparison& l = out.logits;
  std::istringstream fields(text);
  if (!(fields >> out.held_out >> l.tokens >> l.non_finite)) {
    return std::nullopt;
  }
  for (double* number : {&l.source_nll, &l.converted_nll, &l.mean_kl, &l.max_kl, &l.top1_agreement,
                         &l.max_abs_logit_diff, &l.rel_logit_error}) {
    std::string field;
    fields >> field;
    char* end = nullptr;
    // Unlike a stream, it reads "nan" too.
    *number = std::strtod(field.c_str(), &end);
    if (end == field.c_str()) {
      return std::nullopt;
    }
  }
  return out;
}

}  // namespace relatent
