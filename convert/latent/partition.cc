#include "convert/latent/partition.h"

namespace relatent {

std::optional<Partition> partition_of(std::string_view form, Index branches) {
  if (form == "mla" && branches == 1) {
    return Partition{1, 1};
  }
  if (form == "gla" && branches > 1) {
    return Partition{branches, 1};
  }
  if (form == "tpla" && branches > 1) {
    return Partition{1, branches};
  }
  if (form == "mlra" && (branches == 2 || branches == 4)) {
    return branches == 4 ? Partition{1, 4} : Partition{2, 2};
  }
  return std::nullopt;
}

}  // namespace relatent
