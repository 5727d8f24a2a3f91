// A GGUF file: as a file, as the tensors of a model (formats/gguf_source.h), and as that model.
#include "formats/gguf.h"

#include "formats/gguf_source.h"
#include "tests/attack/fuzz/fuzz.h"
#include "tests/attack/fuzz/models.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::filesystem::path path = fuzz::put("model.gguf", fuzz::text_of(data, size));
  const bool whole = fuzz::reads([&] {
    const GgufFile file = GgufFile::open(path);
    for (const auto& [key, value] : file.metadata()) {
      fuzz::require(file.find(key) == &value, "a key that is not found by its name");
      fuzz::touch(gguf_type_name(value));
    }
    for (const GgufTensor& tensor : file.tensors()) {
      fuzz::require(file.find_tensor(tensor.name) == &tensor, "a tensor that is not found by its name");
      fuzz::touch(file.bytes(tensor));
      file.release(tensor);
    }
  });
  if (!whole) {
    return 0;
  }
  fuzz::reads([&] {
    const GgufSource source = GgufSource::open(path);
    fuzz::touch(source.fingerprint());
    for (const std::string& name : source.tensor_names()) {
      fuzz::reads([&, &name = name] { fuzz::touch_dense(source.read_matrix(name)); });
    }
  });
  fuzz::reads([&] {
    const Model model = Model::open(path);
    fuzz::touch_config(model.config());
    fuzz::touch_model(model);
  });
  return 0;
}
