// Token files in NumPy's .npy format (versions 1.0 to 3.0), one dimension, C order: <u2, <i4 or <i8.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <vector>

#include "formats/files.h"

namespace relatent {

// Reads token ids. Throws Error (input): not an npy file, truncated or trailing bytes, big-endian or another
// dtype, not one-dimensional, Fortran order for more than one dimension, empty, a negative id or one that
// does not fit int32.
std::vector<std::int32_t> read_tokens(const std::filesystem::path& path);

// Consecutive runs of `length` tokens from the start of a token file.
struct Sequences {
  std::int64_t count = 0;            // number of sequences
  std::int64_t length = 0;           // tokens in each
  std::vector<std::int32_t> tokens;  // [count * length]
};

// The first `count` sequences, or all when count is 0 or more than there are.
Sequences first_sequences(Sequences sequences, std::int64_t count);
// The last `count` of them, 0 ... sequences.count.
Sequences last_sequences(const Sequences& sequences, std::int64_t count);

// Cuts the first count * length tokens (count = 0: all that fit). Throws Error: usage when length < 2 or more
// sequences are asked for than fit (the sentence says how many do), input when an id is not below vocab_size,
// naming id and index.
Sequences read_sequences(const std::filesystem::path& path, std::int64_t length, std::int64_t count,
                         std::int64_t vocab_size);

// Writes a C-order float32 array [shape...] whose slices along the first axis come from `slice` one at a time
// (each the product of the other sizes long), and commits the file. Throws Error as PendingFile does.
void write_float_array(PendingFile& file, const std::vector<std::int64_t>& shape,
                       const std::function<std::vector<float>(std::int64_t)>& slice);

}  // namespace relatent
