#include "convert/engines/engine.h"

#include "convert/engines/deepseek.h"
#include "convert/engines/gla.h"
#include "convert/engines/mlra.h"
#include "convert/engines/relatent.h"
#include "convert/engines/transformers.h"

namespace relatent {

std::string to_string(const CacheShape& shape) {
  return std::to_string(shape.latent) + "+" + std::to_string(shape.rotary);
}

std::unique_ptr<Engine> make_engine(std::string_view name, std::string_view form) {
  // What stock transformers has no class for is run by the code that goes with our own layout.
  if (name == "relatent" || (name == "transformers" && form != "mla")) {
    return make_relatent_engine();
  }
  if (name == "transformers") {
    return make_transformers_engine();
  }
  if (name == "deepseek" && form == "mla") {
    return make_deepseek_engine();
  }
  if (name == "mlra" && (form == "mlra" || form == "gla")) {
    return make_mlra_engine();
  }
  return name == "gla" && form == "gla" ? make_gla_engine() : nullptr;
}

std::string_view known_engines() {
  return "transformers, relatent, deepseek, mlra, gla";
}

}  // namespace relatent
