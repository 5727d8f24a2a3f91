#include "convert/methods/method.h"

#include <stdexcept>

namespace relatent {

std::optional<LatentAttention> ConversionMethod::next() {
  throw std::logic_error("ConversionMethod: the layers are independent");
}

std::unique_ptr<ConversionMethod> make_method(const ConvertPlan& plan, const ConvertInputs& inputs,
                                              std::optional<Index> fold) {
  switch (plan.options.method) {
    case Method::lossless:
      return make_lossless(plan, inputs);
    case Method::transmla:
      return make_transmla(plan, inputs, fold.value());
    case Method::weights_only:
      return make_weights_only(plan, inputs);
    case Method::relatent:
      return make_relatent(plan, inputs);
  }
  throw std::logic_error("make_method: no such method");
}

}  // namespace relatent
