#include "convert/plan/form_candidates.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "convert/engines/engine.h"
#include "convert/forms/form.h"
#include "convert/plan/inputs.h"
#include "convert/plan/layer_choice.h"
#include "formats/error.h"

namespace relatent {

std::string form_text(std::string_view form, Index branches) {
  return std::string(form) + "-" + std::to_string(branches);
}

std::vector<ConvertOptions> form_candidates(const ConvertOptions& options) {
  if (!options.devices || *options.devices < 2) {
    fail_usage("--to auto needs --devices, at least 2: on one device --to mla is all that there is");
  }
  if (!options.per_device) {
    fail_usage("--to auto needs --per-device, the elements per token and layer that each device caches");
  }
  if (options.method != Method::relatent || !options.calibration) {
    fail_usage(
        "--to auto compares forms by what they lose on calibration tokens: it needs --calibration (make one "
        "with `relatent calibrate`) and --method relatent");
  }
  if (options.branches || options.key_rank || options.relatent.order != LatentOrder::shared) {
    fail_usage("--branches, --key-rank and --order belong to one form, and --to auto is to choose it");
  }
  const Model source = Model::open(options.source, options.context);
  const ModelConfig& config = source.config();
  const bool carries = !carried_layers(options.layers, source).empty();
  std::vector<ConvertOptions> out;
  std::vector<Partition> known;
  for (const Form* form : forms()) {
    for (Index branches = 2; branches <= *options.devices; ++branches) {
      const std::optional<Partition> partition = form->partition(branches);
      if (!partition || partition->latents() != *options.devices ||
          partition->groups > config.num_attention_heads || (config.latent && !form->latent_source) ||
          std::find(known.begin(), known.end(), *partition) != known.end() ||
          !make_engine(options.engine, form->name, &config, carries)) {
        continue;
      }
      known.push_back(*partition);
      ConvertOptions one = options;
      one.form = form->name;
      one.branches = branches;
      out.push_back(std::move(one));
    }
  }
  if (out.empty()) {
    fail_usage("--to auto: --engine " + options.engine + " has no form whose latents " +
               std::to_string(*options.devices) + " devices split");
  }
  return out;
}

}  // namespace relatent
