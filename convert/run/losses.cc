#include "convert/run/losses.h"

#include <cmath>
#include <sstream>

namespace relatent {
namespace {

std::vector<std::string> loss_reasons(const ConvertPlan& plan, const ConvertInputs& inputs) {
  const ConvertOptions& options = plan.options;
  const EngineTraits traits = inputs.engine->traits();
  std::vector<std::string> out;
  if (options.method != Method::relatent) {
    out.emplace_back("--method relatent loses less");
  }
  if (traits.normed_latent) {
    const Index first = converted_layers(inputs).layers().front();
    const bool biased = plan.shape.has_q_bias || inputs.source.has(Role::k_bias, first) ||
                        inputs.source.has(Role::v_bias, first);
    out.push_back(
        "--engine " + options.engine + " has " +
        (biased ? "no place for the biases of this checkpoint and " : "") +
        (normalises_keys(inputs.source.config()) ? "no place for its norms on queries and keys and " : "") +
        "one plain list of rotary frequencies: --engine relatent and transformers keep more");
  }
  const double part =
      static_cast<double>(plan.converted_cache_elements) / static_cast<double>(plan.source_cache_elements);
  if (part < 1 && options.method != Method::lossless) {
    out.push_back("the cache is " + std::to_string(std::llround(100 * part)) +
                  " % of the source's: allow it more with " +
                  (inputs.partition.whole() ? "--kv-budget, --rank or --shape" : "--per-device or --rank"));
  }
  if (inputs.calibration) {
    const Sequences sequences = inputs.calibration->sequences();
    if (sequences.count * sequences.length < 65536) {
      out.push_back("the calibration has " + std::to_string(sequences.count * sequences.length) +
                    " tokens, and 65536 and more are better");
    }
  }
  return out;
}

}  // namespace

std::vector<std::string> loss_warnings(const ConvertPlan& plan, const ConvertInputs& inputs,
                                       double fold_error, const std::optional<Measurement>& measured) {
  std::vector<std::string> out;
  if (fold_error > 0) {
    std::ostringstream text;
    text.precision(2);
    text << "--engine " << plan.options.engine
         << " has no biases: those of q and v became the nearest linear map of the input, which misses up to "
         << fold_error << " of their mean square, and so did what the softmax feels of those of k";
    out.push_back(text.str());
  }
  if (!measured) {
    return out;
  }
  if (std::string warning = loss_warning(*measured, loss_reasons(plan, inputs)); !warning.empty()) {
    out.push_back(std::move(warning));
  }
  return out;
}

}  // namespace relatent
