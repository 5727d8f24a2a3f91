// The journal of an unfinished run (formats/journal.h). Its lines hang together by checksums, which the
// mutator puts right again.
#include "formats/journal.h"

#include "formats/hash.h"
#include "tests/attack/fuzz/fuzz.h"

namespace {

// Every line behind the first with the checksum that it needs.
std::string rechained(std::string_view text) {
  constexpr std::size_t digits = 32;
  std::string checksum;
  std::string out;
  bool first = true;
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    if (!first && line.size() > digits) {
      line.remove_prefix(digits + 1);
      relatent::Hasher hasher;
      hasher.add_text(checksum);
      hasher.add_text(line);
      checksum = hasher.hexadecimal();
      out += checksum + " ";
    }
    out += line;
    if (end != std::string_view::npos) {
      out += '\n';
    }
    first = false;
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::filesystem::path path = fuzz::put("journal", fuzz::text_of(data, size));
  fuzz::reads([&] {
    RunIdentity given;
    JournalEntries entries;
    {
      Journal journal = Journal::open(path);
      given = journal.given();
      for (const auto& [name, value] : journal.entries()) {
        fuzz::require(journal.last(name).has_value(), "an entry that is not found by its name");
        static_cast<void>(journal.last_number(name));
      }
      static_cast<void>(difference(given, journal.entries()));
      fuzz::require(difference(given, given).empty(), "a list that differs from itself");
      journal.append("a\tname", "a\nvalue\\");
      entries = journal.entries();
    }
    // Whatever was cut off, what is left goes on.
    const Journal again = Journal::open(path);
    fuzz::require(again.given() == given && again.entries() == entries, "another journal the second time");
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  using namespace relatent;
  std::string out = fuzz::mutated(fuzz::text_of(data, size), max_size);
  if (fuzz::repairs(seed)) {
    out = rechained(out);
  }
  return fuzz::hand_over(out, data, max_size);
}
