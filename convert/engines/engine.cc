#include "convert/engines/engine.h"

#include "convert/engines/deepseek.h"
#include "convert/engines/transformers.h"

namespace relatent {

std::unique_ptr<Engine> make_engine(std::string_view name) {
  if (name == "transformers") {
    return make_transformers_engine();
  }
  return name == "deepseek" ? make_deepseek_engine() : nullptr;
}

std::string_view known_engines() {
  return "transformers, deepseek";
}

}  // namespace relatent
