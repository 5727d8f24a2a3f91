// A checkpoint folder (formats/checkpoint.h): config.json, weights, and an index of them.
#include "formats/checkpoint.h"

#include <nlohmann/json.hpp>

#include "tests/attack/fuzz/fuzz.h"

namespace {

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"config.json",
                                               relatent::kIndexName,
                                               "model.safetensors",
                                               "model-00001-of-00002.safetensors",
                                               "model-00002-of-00002.safetensors",
                                               "tokenizer.json",
                                               "README.md"};
  return all;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  fuzz::put_files(fuzz::split_files(fuzz::text_of(data, size), names()), names());
  fuzz::reads([&] {
    const Checkpoint checkpoint = Checkpoint::open(fuzz::folder());
    static_cast<void>(checkpoint.index_path());
    static_cast<void>(checkpoint.weight_permissions());
    static_cast<void>(checkpoint.side_files());
    std::uint64_t sum = 0;
    for (const std::string& name : checkpoint.tensor_names()) {
      fuzz::require(checkpoint.contains(name), "a tensor that is not found by its name");
      const std::span<const std::byte> bytes = checkpoint.bytes(name);
      fuzz::touch(bytes);
      sum += bytes.size();
      fuzz::reads([&, &name = name] { fuzz::touch_dense(checkpoint.read_matrix(name)); });
      checkpoint.release(name);
    }
    fuzz::require(checkpoint.tensor_bytes() == sum, "another sum of bytes");
    fuzz::touch(checkpoint.fingerprint());
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  return relatent::fuzz::mutate_files(data, size, max_size, seed, names());
}
