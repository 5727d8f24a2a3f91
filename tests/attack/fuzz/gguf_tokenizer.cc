// What a GGUF file says of a tokenizer (formats/gguf_tokenizer.h), from the files of a Hugging Face folder.
#include "formats/gguf_tokenizer.h"

#include <nlohmann/json.hpp>

#include "formats/json_text.h"
#include "tests/attack/fuzz/fuzz.h"

namespace {

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = {"tokenizer.json", "tokenizer_config.json",
                                               "chat_template.jinja", "config.json"};
  return all;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const fuzz::Files files = fuzz::split_files(fuzz::text_of(data, size), names());
  fuzz::put_files(files, names());
  for (const char* pre : {"", "llama-bpe"}) {
    fuzz::reads([&] {
      const nlohmann::ordered_json config =
          files.contains("config.json")
              ? read_json_object(fuzz::folder() / "config.json", std::size_t{1} << 20U)
              : nlohmann::ordered_json::object();
      for (const auto& [key, value] : gguf_tokenizer(fuzz::folder(), config, pre, 16)) {
        fuzz::touch(key);
        fuzz::touch(gguf_type_name(value));
      }
    });
  }
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  return relatent::fuzz::mutate_files(data, size, max_size, seed, names());
}
