// A model in a checkpoint folder of a single weight file, opened and read whole (convert/model/model.h).
#include "convert/model/model.h"

#include "tests/attack/fuzz/fuzz.h"
#include "tests/attack/fuzz/models.h"

namespace {

constexpr const char* kWeights = "model.safetensors";

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"config.json", kWeights};
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
  using namespace relatent;
  const std::string out = fuzz::mutated(fuzz::text_of(data, size), max_size);
  if (!fuzz::repairs(seed)) {
    return fuzz::hand_over(out, data, max_size);
  }
  fuzz::Files files = fuzz::split_files(out, names());
  if (const auto weights = files.find(kWeights); weights != files.end()) {
    weights->second = fuzz::repaired_safetensors(weights->second);
  }
  return fuzz::hand_over(fuzz::join_files(files), data, max_size);
}
