// A safetensors file (formats/safetensors.h).
#include "formats/safetensors.h"

#include "tests/attack/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::filesystem::path path = fuzz::put("model.safetensors", fuzz::text_of(data, size));
  fuzz::reads([&] {
    const SafetensorsFile file = SafetensorsFile::open(path);
    fuzz::touch(file.header_text());
    for (const auto& [name, value] : file.metadata()) {
      fuzz::touch(name);
      fuzz::touch(value);
    }
    std::uint64_t sum = 0;
    for (const TensorInfo& tensor : file.tensors()) {
      fuzz::require(file.find(tensor.name) == &tensor, "a tensor that is not found by its name");
      const std::span<const std::byte> bytes = file.bytes(tensor);
      fuzz::touch(bytes);
      if (is_float(tensor.dtype)) {
        std::vector<float> values(bytes.size() / size_of(tensor.dtype));
        decode_floats(tensor.dtype, bytes, values);
      }
      file.release(tensor);
      sum += bytes.size();
    }
    fuzz::require(kSafetensorsPrefix + file.header_text().size() + sum == file.file_bytes(),
                  "tensors that do not fill the file");
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  using namespace relatent;
  const std::string out = fuzz::mutated_safetensors(fuzz::text_of(data, size), max_size, seed);
  return fuzz::hand_over(out, data, max_size);
}
