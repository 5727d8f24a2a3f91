// A file of tokens (formats/npy.h).
#include "formats/npy.h"

#include "tests/attack/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::filesystem::path path = fuzz::put("tokens.npy", fuzz::text_of(data, size));
  fuzz::reads([&] {
    const std::vector<std::int32_t> tokens = read_tokens(path);
    fuzz::require(!tokens.empty(), "no tokens");
    for (const std::int32_t token : tokens) {
      fuzz::require(token >= 0, "a negative token");
    }
  });
  for (const std::int64_t vocab_size : {std::int64_t{3}, std::int64_t{1} << 40U}) {
    for (const std::int64_t count : {0, 2}) {
      fuzz::reads(
          [&] {
            const Sequences sequences = read_sequences(path, 2, count, vocab_size);
            fuzz::require(
                sequences.tokens.size() == static_cast<std::size_t>(sequences.count * sequences.length),
                "tokens that do not fill the sequences");
            for (const std::int32_t token : sequences.tokens) {
              fuzz::require(token >= 0 && token < vocab_size, "a token beyond the vocabulary");
            }
            static_cast<void>(first_sequences(sequences, 1));
            static_cast<void>(last_sequences(sequences, 1));
          },
          true);
    }
  }
  return 0;
}
