// Numbers that an interrupted run left (formats/state_file.h).
#include "formats/state_file.h"

#include <array>

#include "formats/hash.h"
#include "tests/attack/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::filesystem::path path = fuzz::put("state", fuzz::text_of(data, size));
  fuzz::reads([&] {
    std::array<double, 3> first{};
    std::array<std::byte, 5> second{};
    const std::optional<std::int64_t> number =
        read_state(path, {std::as_writable_bytes(std::span(first)), std::span(second)});
    if (number) {
      write_state(fuzz::folder() / "again", *number, {std::as_bytes(std::span(first)), std::span(second)})
          .commit();
    } else {
      fuzz::require(first == std::array<double, 3>{} && second == std::array<std::byte, 5>{},
                    "blocks of a file that was not believed");
    }
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  using namespace relatent;
  constexpr std::size_t digits = 32;
  std::string out = fuzz::mutated(fuzz::text_of(data, size), max_size);
  if (fuzz::repairs(seed) && out.size() > digits) {
    Hasher hasher;
    out.resize(out.size() - digits);
    hasher.add(std::as_bytes(std::span(out)));
    out += hasher.hexadecimal();
  }
  return fuzz::hand_over(out, data, max_size);
}
