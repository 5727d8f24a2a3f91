// JSON of every kind (formats/json_text.h), from memory and from a file.
#include "formats/json_text.h"

#include <nlohmann/json.hpp>

#include "tests/attack/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::string_view text = fuzz::text_of(data, size);
  const std::filesystem::path path = fuzz::folder() / "any.json";
  fuzz::reads([&] {
    const nlohmann::ordered_json json = parse_json(path, text);
    // What was believed can be written and read again.
    const std::string again = json.dump();
    fuzz::require(parse_json(path, again).dump() == again, "JSON that changes when it is read again");
  });
  fuzz::reads(
      [&] { static_cast<void>(read_json_object(fuzz::put("any.json", text), std::size_t{1} << 16U)); });
  return 0;
}
