// The closed forms of relatent.h without any token to fit on.
#include "convert/methods/relatent.h"

namespace relatent {

std::unique_ptr<ConversionMethod> make_weights_only(const ConvertPlan& plan, const ConvertInputs& inputs) {
  return std::make_unique<RelatentConversion>(
      inputs.source, [&inputs](Index layer_idx) { return input_moments(inputs, layer_idx); }, Sequences{},
      relatent_options(plan.options, inputs, plan.shape));
}

}  // namespace relatent
