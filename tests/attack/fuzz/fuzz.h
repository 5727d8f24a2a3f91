// What the fuzz targets share: a private folder for the bytes that readers take from files, what a reader may
// throw, and how several files travel in one input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
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
// Puts those that are there into the private folder, and removes the others of these names.
void put_files(const Files& files, const std::vector<std::string>& names);

// The value of a JSON text, without what is nested so deeply that the library's recursion would not come back
// from it; discarded where the text is no JSON.
nlohmann::ordered_json any_json(std::string_view text);
// libFuzzer's mutation of a text of any size up to max_size.
std::string mutated(std::string_view text, std::size_t max_size);
// The same for JSON, of which two of three mutations leave JSON: values, members and elements changed,
// copied, removed. What is done follows from the seed. Other text is mutated as text.
std::string mutated_json(std::string_view text, std::size_t max_size, unsigned seed);
// The same for a safetensors file and its header. Of JSON headers most get the length and the data that they
// ask for: nearly all others would end at ranges that do not fill the data.
std::string mutated_safetensors(std::string_view file, std::size_t max_size, unsigned seed);
// The same for one of several files (split_files) or their whole.
std::string mutated_files(std::string_view input, const std::vector<std::string>& names, std::size_t max_size,
                          unsigned seed);
// Copies a mutation to where libFuzzer wants it, cut to max_size; its size.
std::size_t hand_over(std::string_view text, std::uint8_t* data, std::size_t max_size);
// All of what a target's mutator does to an input of several files.
std::size_t mutate_files(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed,
                         const std::vector<std::string>& names);
// True for seven of eight seeds: where putting right what guards a file is worth more than what that hides.
inline bool repairs(unsigned seed) {
  return seed % 8 != 0;
}

}  // namespace relatent::fuzz
