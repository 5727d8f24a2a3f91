// TPLA (Tang et al. 2025, arXiv 2508.15881): one latent in parts, which all heads read.
#include "convert/forms/form.h"

namespace relatent {
namespace {

std::optional<Partition> partition(std::optional<Index> branches) {
  return branches.value_or(0) > 1 ? std::optional(Partition{1, *branches}) : std::nullopt;
}

}  // namespace

const Form& tpla_form() {
  static const Form form = {.name = "tpla",
                            .partition = partition,
                            .branches = "needs --branches, at least 2",
                            .slices = true,
                            .examples = {{"TPLA-2", 2, 0.25}, {"TPLA-4 / MLRA-4", 4, 0.1875}}};
  return form;
}

}  // namespace relatent
