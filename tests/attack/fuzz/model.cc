// A model in a checkpoint folder of a single weight file, opened and read whole (convert/model/model.h).
#include "convert/model/model.h"

#include "tests/attack/fuzz/fuzz.h"
#include "tests/attack/fuzz/models.h"

namespace {

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"config.json", "model.safetensors"};
  return all;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  fuzz::Files files = fuzz::split_files(fuzz::text_of(data, size), names());
  for (const std::string& name : names()) {
    fuzz::put(name, files[name]);
  }
  fuzz::reads([&] {
    const Model model = Model::open(fuzz::folder());
    fuzz::touch_config(model.config());
    fuzz::touch_model(model);
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  return relatent::fuzz::mutate_files(data, size, max_size, seed, names());
}
