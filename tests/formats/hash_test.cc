#include "formats/hash.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <string>

#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::bytes_of;

std::string hash_of(const std::string& bytes, std::size_t piece) {
  Hasher hasher;
  for (std::size_t at = 0; at < bytes.size(); at += piece) {
    hasher.add(bytes_of(bytes).subspan(at, std::min(piece, bytes.size() - at)));
  }
  return hasher.hexadecimal();
}

TEST(Hasher, IsXxh3) {
  // What other programs print for XXH3-128.
  EXPECT_EQ(Hasher().hexadecimal(), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(hash_of("a", 1), "a96faf705af16834e6c632b61e964e1f");
}

TEST(Hasher, PiecesDoNotMatter) {
  std::string bytes;
  for (int i = 0; i < 1000; ++i) {
    bytes += std::to_string(i);
  }
  const std::string whole = hash_of(bytes, bytes.size());
  for (const std::size_t piece : {1U, 7U, 256U, 1000U}) {
    EXPECT_EQ(hash_of(bytes, piece), whole);
  }
  bytes.back() ^= 1;
  EXPECT_NE(hash_of(bytes, bytes.size()), whole);
}

TEST(Hasher, TextsDoNotRunTogether) {
  Hasher one;
  one.add_text("ab");
  one.add_text("c");
  Hasher other;
  other.add_text("a");
  other.add_text("bc");
  EXPECT_NE(one.hexadecimal(), other.hexadecimal());
  Hasher number;
  number.add_number(2);
  number.add(bytes_of("ab"));
  number.add_number(1);
  number.add(bytes_of("c"));
  EXPECT_EQ(one.hexadecimal(), number.hexadecimal());
}

}  // namespace
}  // namespace relatent
