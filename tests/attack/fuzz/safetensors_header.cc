// The text of a safetensors header (formats/safetensors.h). The first four bytes say how much data follows
// it.
#include <cstring>

#include "formats/safetensors.h"
#include "tests/attack/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  std::uint32_t data_bytes = 0;
  if (size < sizeof data_bytes) {
    return 0;
  }
  std::memcpy(&data_bytes, data, sizeof data_bytes);
  const std::string_view text = fuzz::text_of(data + sizeof data_bytes, size - sizeof data_bytes);
  fuzz::reads([&] {
    const SafetensorsHeader header =
        parse_safetensors_header(fuzz::folder() / "model.safetensors", text, data_bytes);
    std::uint64_t sum = 0;
    for (const TensorInfo& tensor : header.tensors) {
      fuzz::touch(tensor.name);
      fuzz::touch(shape_text(tensor.shape));
      fuzz::require(dense_bytes(tensor.dtype, tensor.shape) == tensor.bytes, "a tensor of another size");
      sum += tensor.bytes;
    }
    fuzz::require(sum == data_bytes, "tensors that do not fill the data");
    for (const auto& [name, value] : header.metadata) {
      fuzz::touch(name);
      fuzz::touch(value);
    }
  });
  return 0;
}
