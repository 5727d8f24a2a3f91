#include "convert/plan/options.h"

namespace relatent {

std::string_view method_name(Method method) {
  switch (method) {
    case Method::lossless:
      return "lossless";
    case Method::transmla:
      return "transmla";
    case Method::relatent:
      return "relatent";
    case Method::weights_only:
      return "weights-only";
  }
  return "";
}

}  // namespace relatent
