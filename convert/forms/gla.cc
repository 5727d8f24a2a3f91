// GLA (Zadouri et al. 2025, arXiv 2505.21487): heads in groups, each with a latent of its own.
#include "convert/forms/form.h"

namespace relatent {
namespace {

std::optional<Partition> partition(std::optional<Index> branches) {
  return branches.value_or(0) > 1 ? std::optional(Partition{*branches, 1}) : std::nullopt;
}

}  // namespace

const Form& gla_form() {
  static const Form form = {.name = "gla",
                            .partition = partition,
                            .branches = "needs --branches, at least 2",
                            .examples = {{"GLA-2", 2, 0.25}}};
  return form;
}

}  // namespace relatent
