// MLA (DeepSeek-V2 2024, arXiv 2405.04434): one latent that every head reads.
#include "convert/forms/form.h"

namespace relatent {
namespace {

std::optional<Partition> partition(std::optional<Index> branches) {
  return branches.value_or(1) == 1 ? std::optional(Partition{1, 1}) : std::nullopt;
}

}  // namespace

const Form& mla_form() {
  static const Form form = {.name = "mla",
                            .partition = partition,
                            .branches = "has one latent: leave out --branches",
                            .latent_source = false,
                            .examples = {{"MLA", 1, 0.5}, {"MLA", 1, 0.25}}};
  return form;
}

}  // namespace relatent
