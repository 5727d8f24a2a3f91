// What the fuzz targets share: a private folder for the bytes that readers take from files, what a reader may
// throw, and how several files travel in one input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/error.h"
#include "formats/files.h"

namespace relatent::fuzz {

// The bytes of an input.
inline std::string_view text_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

// Ends the program, which libFuzzer takes for a finding, unless it holds.
void require(bool holds, const std::string& what);

// A folder of this process alone, in memory where the system has /dev/shm; RELATENT_FUZZ_FOLDER names another
// place for it. Removed when the process ends by itself.
const std::filesystem::path& folder();
// Writes a file of that folder, or of one inside it.
std::filesystem::path put(const std::string& name, std::string_view bytes);

// What a writer leaves at a path of the private folder.
template <typename Write>
std::string written(const Write& write) {
  const std::filesystem::path path = folder() / "written";
  std::filesystem::remove(path);
  write(path);
  return read_text(path, std::size_t{1} << 20U);
}

// Reads every byte.
void touch(std::span<const std::byte> bytes);
void touch(std::string_view text);
// Of a dense matrix or vector.
template <typename Dense>
void touch_dense(const Dense& dense) {
  touch(std::as_bytes(std::span(dense.data(), static_cast<std::size_t>(dense.size()))));
}

// Ends the program unless the error is what a file may deserve: one line that names the folder, of the kind
// `input` (or, where `usage`, of that kind).
void check_error(const Error& error, bool usage);

// Calls a reader with what it is given here; an Error is an answer, everything else that is thrown a finding.
template <typename Work>
bool reads(const Work& work, bool usage = false) {
  try {
    work();
    return true;
  } catch (const Error& error) {
    check_error(error, usage);
    return false;
  }
}

// Several files as one input: "%%%", the name and a line break before the bytes of each. The mark makes them
// easy to cut, exchange and repeat. Only names of the list count, what comes under another is left out.
using Files = std::map<std::string, std::string>;
Files split_files(std::string_view input, const std::vector<std::string>& names);
std::string join_files(const Files& files);

// A safetensors file whose header is JSON, with the length and the data that this header asks for; other
// bytes as they are. Mutations of a header alone would nearly all end at ranges that do not fill the data.
std::string repaired_safetensors(std::string_view file);

// libFuzzer's mutation of a text of any size up to max_size.
std::string mutated(std::string_view text, std::size_t max_size);
// Copies a mutation to where libFuzzer wants it, cut to max_size; its size.
std::size_t hand_over(std::string_view text, std::uint8_t* data, std::size_t max_size);
// True for seven of eight seeds: where a repair is worth more than what it hides.
inline bool repairs(unsigned seed) {
  return seed % 8 != 0;
}

}  // namespace relatent::fuzz
