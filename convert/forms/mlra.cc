// MLRA (Liu et al. 2026): four parts that all heads read, or (MLRA-2) two for each half of the heads.
#include "convert/forms/form.h"

namespace relatent {
namespace {

std::optional<Partition> partition(std::optional<Index> branches) {
  if (branches == 4) {
    return Partition{1, 4};
  }
  return branches == 2 ? std::optional(Partition{2, 2}) : std::nullopt;
}

}  // namespace

const Form& mlra_form() {
  static const Form form = {
      .name = "mlra", .partition = partition, .branches = "needs --branches 2 or 4", .examples = {}};
  return form;
}

}  // namespace relatent
