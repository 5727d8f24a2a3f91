#include "formats/journal.h"

#include <gtest/gtest.h>

#include <string>

#include "formats/hash.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::expect_error;
using testing_support::read_bytes;
using testing_support::TempFolder;

const RunIdentity kGiven = {{"--rank", "192"}, {"the source's a\tb\\c\nd", "12 bytes"}, {"empty", ""}};
const RunIdentity kEntries = {{"copied", "3"}, {"trial", "16 48"}, {"copied", "12"}, {"note\n", "a\\tb\t"}};

// A journal with all of kEntries; its path.
fs::path sample(const TempFolder& folder) {
  fs::path path = folder / "journal";
  Journal journal = Journal::create(path, kGiven);
  for (const auto& [name, value] : kEntries) {
    journal.append(name, value);
  }
  return path;
}

// The start of every line, and the end of the last.
std::vector<std::size_t> lines_of(const std::string& text) {
  std::vector<std::size_t> out = {0};
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\n') {
      out.push_back(i + 1);
    }
  }
  return out;
}

TEST(Journal, RemembersWhatWasAppended) {
  const TempFolder folder;
  const fs::path path = sample(folder);
  Journal journal = Journal::open(path);
  EXPECT_EQ(journal.given(), kGiven);
  EXPECT_EQ(journal.entries(), kEntries);
  EXPECT_EQ(journal.last("trial"), "16 48");
  EXPECT_EQ(journal.last("copied"), "12");
  EXPECT_EQ(journal.last_number("copied"), 12);
  EXPECT_EQ(journal.last("none"), std::nullopt);
  EXPECT_EQ(journal.last_number("none"), 0);
  EXPECT_EQ(journal.last_number("trial"), 0);
  journal.append("more", "-1");
  EXPECT_EQ(journal.last_number("more"), 0);
  EXPECT_EQ(Journal::open(path).entries().size(), kEntries.size() + 1);
}

TEST(Journal, EveryCutLeavesTheLinesBeforeIt) {
  const TempFolder folder;
  const std::string whole = read_bytes(sample(folder));
  const std::vector<std::size_t> lines = lines_of(whole);
  const std::size_t first_entry = kGiven.size() + 2;  // behind the first line and "begun"
  for (std::size_t size = lines[first_entry]; size <= whole.size(); ++size) {
    const fs::path path = folder.write("cut", whole.substr(0, size));
    std::size_t expected = 0;
    while (lines[first_entry + expected + 1] <= size && expected + 1 < lines.size() - first_entry) {
      ++expected;
      if (first_entry + expected + 1 == lines.size()) {
        break;
      }
    }
    Journal journal = Journal::open(path);
    ASSERT_EQ(journal.entries().size(), expected) << size;
    // What comes next takes the place of the torn line.
    journal.append("next", "1");
    ASSERT_EQ(Journal::open(path).entries().size(), expected + 1) << size;
  }
  for (const std::size_t size : {std::size_t{0}, std::size_t{5}, lines[1], lines[first_entry] - 1}) {
    const fs::path path = folder.write("cut", whole.substr(0, size));
    expect_error(ErrorKind::input, {"cut", "journal"}, [&] { Journal::open(path); });
  }
}

TEST(Journal, AChangedByteEndsWhatIsBelieved) {
  const TempFolder folder;
  const std::string whole = read_bytes(sample(folder));
  const std::vector<std::size_t> lines = lines_of(whole);
  const std::size_t first_entry = kGiven.size() + 2;
  for (std::size_t entry = 0; entry < kEntries.size(); ++entry) {
    const std::size_t begin = lines[first_entry + entry];
    const std::size_t end = lines[first_entry + entry + 1];
    for (std::size_t i = begin; i < end; ++i) {
      std::string changed = whole;
      changed[i] = static_cast<char>(changed[i] ^ 1);
      EXPECT_EQ(Journal::open(folder.write("changed", changed)).entries().size(), entry) << i;
    }
  }
  for (std::size_t i = 0; i < lines[first_entry]; ++i) {
    std::string changed = whole;
    changed[i] = static_cast<char>(changed[i] ^ 1);
    expect_error(ErrorKind::input, {"journal"}, [&] { Journal::open(folder.write("changed", changed)); });
  }
}

TEST(Journal, ALineThatIsNoEntryIsCutOff) {
  const TempFolder folder;
  const std::string whole = read_bytes(sample(folder));
  // The last line's checksum is that of all before it.
  const std::size_t last = whole.rfind('\n', whole.size() - 2) + 1;
  Hasher hasher;
  hasher.add_text(whole.substr(last, 32));
  hasher.add_text("begun");
  const fs::path path = folder.write("other", whole + hasher.hexadecimal() + " begun\n");
  Journal::open(path).append("next", "1");
  EXPECT_EQ(Journal::open(path).last("next"), "1");
  EXPECT_EQ(Journal::open(path).entries().size(), kEntries.size() + 1);
}

TEST(Journal, LinesOutOfTheirPlaceAreNotBelieved) {
  const TempFolder folder;
  const std::string whole = read_bytes(sample(folder));
  const std::vector<std::size_t> lines = lines_of(whole);
  const std::size_t first = kGiven.size() + 2;
  const auto line = [&](std::size_t i) { return whole.substr(lines[i], lines[i + 1] - lines[i]); };
  const std::string beginning = whole.substr(0, lines[first]);
  const auto believed = [&](const std::string& text) {
    return Journal::open(folder.write("other", text)).entries().size();
  };
  EXPECT_EQ(believed(beginning + line(first + 1) + line(first)), 0U);         // swapped
  EXPECT_EQ(believed(beginning + line(first) + line(first + 2)), 1U);         // one left out
  EXPECT_EQ(believed(beginning + line(first) + line(first)), 1U);             // one twice
  EXPECT_EQ(believed(beginning + line(first) + "\n" + line(first + 1)), 1U);  // an empty one
  EXPECT_EQ(believed(beginning + line(first) + line(first + 1) + "copied"), 2U);
}

TEST(Journal, RefusesWhatIsNoJournal) {
  const TempFolder folder;
  expect_error(ErrorKind::input, {"foreign", "not a journal"},
               [&] { Journal::open(folder.write("foreign", "hello\nworld\n")); });
  expect_error(ErrorKind::input, {"another version", "relatent journal 2"},
               [&] { Journal::open(folder.write("newer", "relatent journal 2\n")); });
  expect_error(ErrorKind::input, {"damaged"},
               [&] { Journal::open(folder.write("short", "relatent journal 1\n")); });
  expect_error(ErrorKind::input, {"missing"}, [&] { Journal::open(folder / "missing"); });
  fs::create_directory(folder / "folder");
  expect_error(ErrorKind::input, {"folder"}, [&] { Journal::open(folder / "folder"); });
  EXPECT_EQ(read_bytes(folder / "foreign"), "hello\nworld\n");
}

TEST(Difference, NamesWhatDiffers) {
  EXPECT_EQ(difference(kGiven, kGiven), "");
  EXPECT_EQ(difference({{"a", "1"}, {"a", "2"}}, {{"a", "1"}, {"a", "2"}}), "");
  EXPECT_EQ(difference({{"a", "1"}, {"b", "2"}}, {{"b", "2"}, {"a", "1"}}), "");
  EXPECT_EQ(difference({{"a", "1"}}, {{"a", "2"}}), "a was 1 and is 2 now");
  EXPECT_EQ(difference({{"a", "1"}}, {{"b", "2"}}),
            "a was 1 and is not there now, b was not there and is 2 now");
  EXPECT_NE(difference({}, {{"a", ""}, {"b", ""}, {"c", ""}, {"d", ""}, {"e", ""}}).find("2 more"),
            std::string::npos);
}

}  // namespace
}  // namespace relatent
