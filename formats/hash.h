// Checksums: XXH3-128, which notices damage and changes but is no proof against malice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace relatent {

// XXH3-128 over pieces of any size; how the input is cut into pieces does not matter.
class Hasher {
 public:
  Hasher();  // throws Error (machine) when out of memory
  ~Hasher();
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;

  void add(std::span<const std::byte> bytes);
  void add_number(std::uint64_t number);  // its eight bytes
  // With its length, so that no two lists of texts look alike.
  void add_text(std::string_view text);
  // Of all that was added so far: 32 hexadecimal digits.
  std::string hexadecimal() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Of the bytes alone, as hexadecimal() gives it.
std::string checksum_of(std::span<const std::byte> bytes);

}  // namespace relatent
