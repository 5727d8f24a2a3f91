// The closed forms of relatent.h without any token to fit on.
#include "convert/methods/relatent.h"

namespace relatent {

std::unique_ptr<ConversionMethod> make_weights_only(const ConvertPlan& plan, const ConvertInputs& inputs) {
  return make_relatent_on(Sequences{}, plan, inputs);
}

}  // namespace relatent
