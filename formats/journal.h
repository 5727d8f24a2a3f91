// What an unfinished run has done so far, as a text file that survives being cut off anywhere.
//
//   relatent journal 1
//   <checksum> given <name>\t<value>         what decides the result, one line each
//   <checksum> begun
//   <checksum> <name>\t<value>               entries, in the order in which they were appended
//
// A checksum is XXH3-128 over the one before it and the line, so that a line that is torn, changed or out of
// its place ends what is believed. Backslashes, tabs and line breaks are written \\, \t and \n.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace relatent {

// Names and values of what decides a result; equal lists give equal bytes.
using JournalEntries = std::vector<std::pair<std::string, std::string>>;
// What decides the result of a run.
using RunIdentity = JournalEntries;

// What differs: "NAME was VALUE and is VALUE now", for at most three names. Empty when the lists agree.
std::string difference(const RunIdentity& before, const RunIdentity& now);

class Journal {
 public:
  // Makes the file, whole or not at all. Throws Error (machine).
  static Journal create(const std::filesystem::path& path, const RunIdentity& given);
  // Reads the file and cuts off what cannot be believed at its end. Throws Error: input when it is not a
  // journal, is one of another format version or its beginning is damaged; machine when it cannot be read.
  static Journal open(const std::filesystem::path& path);

  Journal(Journal&& other) noexcept;
  Journal& operator=(Journal&&) = delete;
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;
  ~Journal();

  const RunIdentity& given() const { return given_; }
  // Everything appended so far, also by earlier runs.
  const JournalEntries& entries() const { return entries_; }
  // The value of the last entry of that name.
  std::optional<std::string> last(std::string_view name) const;
  // Likewise as a count, 0 where there is none.
  std::int64_t last_number(std::string_view name) const;

  // Appends an entry; it is on the disk when this returns. Throws Error (machine).
  void append(std::string_view name, std::string_view value);

 private:
  explicit Journal(std::filesystem::path path) : path_(std::move(path)) {}

  std::filesystem::path path_;
  int fd_ = -1;
  std::uint64_t end_ = 0;  // of what is believed
  std::string checksum_;   // of the last line
  RunIdentity given_;
  JournalEntries entries_;
};

}  // namespace relatent
