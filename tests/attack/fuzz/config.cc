// A config.json of any family (convert/model/config.h).
#include "convert/model/config.h"

#include <nlohmann/json.hpp>

#include "formats/json_text.h"
#include "tests/attack/fuzz/fuzz.h"
#include "tests/attack/fuzz/models.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::filesystem::path path = fuzz::folder() / "config.json";
  fuzz::reads([&] {
    const nlohmann::ordered_json config = parse_json(path, fuzz::text_of(data, size));
    if (config.is_object()) {
      fuzz::touch_config(parse_config(config, path));
    }
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  using namespace relatent;
  return fuzz::hand_over(fuzz::mutated_json(fuzz::text_of(data, size), max_size, seed), data, max_size);
}
