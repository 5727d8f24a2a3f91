#include "convert/engines/engine.h"

#include "convert/engines/transformers.h"

namespace relatent {

std::unique_ptr<Engine> make_engine(std::string_view name) {
  return name == "transformers" ? make_transformers_engine() : nullptr;
}

std::string_view known_engines() {
  return "transformers";
}

}  // namespace relatent
