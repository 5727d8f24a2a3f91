// GLA whose latents are split as TPLA splits its one: heads in groups, two parts for each. MLRA-2 for any
// number of groups, for more devices than there are key/value heads.
#include "convert/forms/form.h"

namespace relatent {
namespace {

std::optional<Partition> partition(std::optional<Index> branches) {
  const Index latents = branches.value_or(0);
  return latents >= 4 && latents % 2 == 0 ? std::optional(Partition{latents / 2, 2}) : std::nullopt;
}

}  // namespace

const Form& gtpla_form() {
  static const Form form = {.name = "gtpla",
                            .partition = partition,
                            .branches = "needs --branches, an even number of at least 4",
                            .examples = {}};
  return form;
}

}  // namespace relatent
