#include "formats/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <filesystem>
#include <string>
#include <utility>

#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::expect_error;
using testing_support::random_bytes;
using testing_support::TempFolder;
using testing_support::text_of;

TEST(MappedFile, ShowsTheBytes) {
  const TempFolder folder;
  const std::string bytes = random_bytes(100'003, 1);
  const fs::path path = folder.write("a", bytes);
  MappedFile file = MappedFile::open(path);
  EXPECT_EQ(text_of(file.bytes()), bytes);
  EXPECT_EQ(file.path(), path);

  // Releasing changes nothing that can be read, wherever the range lies.
  for (const std::size_t offset : {0UL, 1UL, 4096UL, 5000UL, 100'000UL, 100'003UL, ~0UL}) {
    for (const std::size_t size : {0UL, 1UL, 4096UL, 50'000UL, ~0UL}) {
      file.release(offset, size);
    }
  }
  EXPECT_EQ(text_of(file.bytes()), bytes);

  MappedFile moved = std::move(file);
  EXPECT_EQ(text_of(moved.bytes()), bytes);
  MappedFile assigned;
  assigned = std::move(moved);
  EXPECT_EQ(text_of(assigned.bytes()), bytes);
  EXPECT_TRUE(MappedFile().bytes().empty());
}

TEST(MappedFile, TakesAnEmptyFile) {
  const TempFolder folder;
  EXPECT_TRUE(MappedFile::open(folder.write("empty", "")).bytes().empty());
}

TEST(MappedFile, RefusesWhatIsNoRegularFile) {
  const TempFolder folder;
  expect_error(ErrorKind::input, {"missing", "cannot open", "No such file"},
               [&] { MappedFile::open(folder / "missing"); });
  expect_error(ErrorKind::input, {folder.path().string(), "expected a regular file", "found a folder"},
               [&] { MappedFile::open(folder.path()); });
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  expect_error(ErrorKind::input, {"pipe", "expected a regular file", "found a pipe"},
               [&] { MappedFile::open(folder / "pipe"); });
  expect_error(ErrorKind::input, {"/dev/null", "found a device"}, [&] { MappedFile::open("/dev/null"); });
  if (::geteuid() != 0) {
    const fs::path locked = folder.write("locked", "x");
    ::chmod(locked.c_str(), 0);
    expect_error(ErrorKind::machine, {"locked", "cannot open", "Permission denied"},
                 [&] { MappedFile::open(locked); });
  }
}

// The last byte that a page of its own holds, after the file has lost that page.
std::byte read_beyond(const MappedFile& file) {
  EXPECT_EQ(::truncate(file.path().c_str(), 1), 0);
  const volatile std::byte* last = &file.bytes().back();
  return *last;
}

TEST(MappedFileDeathTest, ACutFileIsNamed) {
  const TempFolder folder;
  const std::string bytes = random_bytes(100'003, 1);
  folder.write("one", bytes);
  folder.write("two\nlines", bytes);
  const auto cut = [&] {
    report_cut_files();
    const MappedFile one = MappedFile::open(folder / "one");
    MappedFile two = MappedFile::open(folder / "two\nlines");
    { const MappedFile gone = MappedFile::open(folder / "one"); }
    const MappedFile moved = std::move(two);
    static_cast<void>(read_beyond(moved));
  };
  EXPECT_EXIT(cut(), testing::ExitedWithCode(4),
              "relatent: .*two.nlines: changed or was cut while it was read");
}

TEST(MappedFileDeathTest, OtherBusErrorsEndTheProgramAsBefore) {
  const auto raised = [] {
    report_cut_files();
    ::raise(SIGBUS);
  };
  EXPECT_EXIT(raised(), testing::KilledBySignal(SIGBUS), "");
}

TEST(MappedFile, IsKnownByItsAddresses) {
  const TempFolder folder;
  folder.write("one", random_bytes(10'000, 1));
  const void* first = nullptr;
  {
    MappedFile file = MappedFile::open(folder / "one");
    first = file.bytes().data();
    EXPECT_EQ(mapped_file_at(first), folder / "one");
    EXPECT_EQ(mapped_file_at(&file.bytes().back()), folder / "one");
    EXPECT_EQ(mapped_file_at(file.bytes().data() + file.bytes().size()), fs::path());
    const MappedFile moved = std::move(file);
    EXPECT_EQ(mapped_file_at(first), folder / "one");
  }
  EXPECT_EQ(mapped_file_at(first), fs::path());
  EXPECT_EQ(mapped_file_at(nullptr), fs::path());
}

}  // namespace
}  // namespace relatent
