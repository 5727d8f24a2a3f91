#include "formats/files.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "formats/mapped_file.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::bytes_of;
using testing_support::expect_error;
using testing_support::random_bytes;
using testing_support::read_bytes;
using testing_support::TempFolder;

std::size_t entries(const fs::path& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

TEST(ReadText, ReadsUpToItsLimit) {
  const TempFolder folder;
  const fs::path path = folder.write("a.txt", std::string("one\0two", 7));
  EXPECT_EQ(read_text(path, 7), std::string("one\0two", 7));
  EXPECT_EQ(read_text(folder.write("empty", ""), 0), "");
  expect_error(ErrorKind::input, {"a.txt", "too large", "at most 6 bytes", "found 7"},
               [&] { read_text(path, 6); });
  expect_error(ErrorKind::input, {"missing"}, [&] { read_text(folder / "missing", 6); });
}

TEST(IsPlainName, StaysInTheFolder) {
  for (const char* name : {"a", "config.json", "...", ".hidden", "a b"}) {
    EXPECT_TRUE(is_plain_name(name)) << name;
  }
  for (const std::string& name : {std::string(), std::string("."), std::string(".."), std::string("a/b"),
                                  std::string("/a"), std::string("a\0b", 3)}) {
    EXPECT_FALSE(is_plain_name(name)) << name;
  }
}

TEST(PendingFile, AppearsOnlyAtCommit) {
  const TempFolder folder;
  const fs::path path = folder / "out";
  {
    PendingFile file(path);
    EXPECT_EQ(file.partial_path(), folder / "out.partial");
    EXPECT_EQ(file.path(), path);
    file.write_at(3, bytes_of("def"));
    file.write_at(0, bytes_of("abc"));
    EXPECT_FALSE(fs::exists(path));
    EXPECT_TRUE(fs::exists(file.partial_path()));
    file.commit();
    EXPECT_EQ(read_bytes(path), "abcdef");
    EXPECT_THROW(file.write_at(0, bytes_of("x")), std::logic_error);
    EXPECT_THROW(file.reserve(1), std::logic_error);
    EXPECT_THROW(file.copy_at(0, path, 0, 1), std::logic_error);
    EXPECT_THROW(file.commit(), std::logic_error);
  }
  EXPECT_EQ(read_bytes(path), "abcdef");
  EXPECT_EQ(entries(folder.path()), 1U);
}

TEST(PendingFile, LeavesNothingWithoutCommit) {
  const TempFolder folder;
  const fs::path path = folder.write("out", "old");
  {
    PendingFile file(path);
    file.write_at(0, bytes_of("new"));
    const PendingFile moved(std::move(file));
    EXPECT_TRUE(fs::exists(folder / "out.partial"));
  }
  EXPECT_EQ(read_bytes(path), "old");
  EXPECT_EQ(entries(folder.path()), 1U);
}

TEST(PendingFile, ReplacesAtCommitAndForgetsOldPartials) {
  const TempFolder folder;
  const fs::path path = folder.write("out", "old and long");
  folder.write("out.partial", "left over from an interrupted run");
  PendingFile file(path);
  file.write_at(0, bytes_of("new"));
  file.commit();
  EXPECT_EQ(read_bytes(path), "new");
}

TEST(PendingFile, ReserveSetsTheLength) {
  const TempFolder folder;
  PendingFile file(folder / "out");
  file.reserve(1000);
  EXPECT_EQ(fs::file_size(file.partial_path()), 1000U);
  file.reserve(10);
  EXPECT_EQ(fs::file_size(file.partial_path()), 10U);
  file.reserve(0);
  EXPECT_EQ(fs::file_size(file.partial_path()), 0U);
  expect_error(ErrorKind::machine, {"out.partial", "bytes"},
               [&] { file.reserve(std::numeric_limits<std::uint64_t>::max()); });
  expect_error(ErrorKind::machine, {"out.partial", "cannot reserve"},
               [&] { file.reserve(std::uint64_t{1} << 62U); });
}

TEST(PendingFile, CannotBeCreated) {
  const TempFolder folder;
  expect_error(ErrorKind::machine, {"no/out.partial", "cannot create"},
               [&] { const PendingFile file(folder / "no/out"); });
  fs::create_symlink(folder / "elsewhere", folder / "link.partial");
  expect_error(ErrorKind::machine, {"link.partial", "cannot create"},
               [&] { const PendingFile file(folder / "link"); });
  EXPECT_FALSE(fs::exists(folder / "elsewhere"));
}

TEST(PendingFile, IsWrittenByOneAtATime) {
  const TempFolder folder;
  const fs::path path = folder / "out";
  PendingFile first(path);
  first.write_at(0, bytes_of("first"));
  for (const auto& second : {+[](const fs::path& where) { const PendingFile file(where); },
                             +[](const fs::path& where) { PendingFile::reopen(where); }}) {
    expect_error(ErrorKind::usage, {"out.partial", "another run is writing there"}, [&] { second(path); });
  }
  first.commit();
  EXPECT_EQ(read_bytes(path), "first");
  PendingFile next(path);
  next.commit();
  EXPECT_EQ(read_bytes(path), "");
}

TEST(PendingFile, ThePartialNameMustBeAFile) {
  const TempFolder folder;
  ASSERT_EQ(::mkfifo((folder / "out.partial").c_str(), 0600), 0);
  expect_error(ErrorKind::usage, {"out.partial", "a pipe"}, [&] { const PendingFile file(folder / "out"); });
  EXPECT_TRUE(fs::is_fifo(folder / "out.partial"));
}

TEST(PendingFile, ReplacesNothingButRegularFiles) {
  const TempFolder folder;
  folder.write("file", "old");
  fs::create_symlink("file", folder / "link");
  fs::create_symlink("nowhere", folder / "broken");
  fs::create_directory(folder / "folder");
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  for (const auto& [name, kind] : {std::pair{"link", "a symbolic link"},
                                   {"broken", "a symbolic link"},
                                   {"folder", "a folder"},
                                   {"pipe", "a pipe"}}) {
    expect_error(ErrorKind::usage, {(folder / name).string(), kind, "choose another name"},
                 [&, where = folder / name] { const PendingFile file(where); });
    EXPECT_FALSE(fs::exists(folder / (std::string(name) + ".partial")));
    // It appears while the file is being written.
    PendingFile late(folder / "late");
    fs::rename(folder / name, folder / "late");
    expect_error(ErrorKind::usage, {"late", kind}, [&] { late.commit(); });
    fs::remove(folder / "late");
  }
  expect_error(ErrorKind::usage, {"/dev/null", "a device"}, [] { const PendingFile file("/dev/null"); });
  EXPECT_EQ(read_bytes(folder / "file"), "old");
}

void check_copies(const fs::path& source, const std::string& bytes, const fs::path& target) {
  PendingFile file(target);
  file.reserve(bytes.size() + 7);
  const std::size_t cut = 12'345;
  file.copy_at(7 + cut, source, cut, bytes.size() - cut);
  file.copy_at(7, source, 0, cut);
  file.copy_at(3, source, 9, 0);
  file.write_at(0, bytes_of("header!"));
  file.commit();
  EXPECT_TRUE(read_bytes(target) == "header!" + bytes);
}

TEST(PendingFile, CopiesRanges) {
  const TempFolder folder;
  const std::string bytes = random_bytes(9'000'001, 2);
  check_copies(folder.write("source", bytes), bytes, folder / "target");
}

TEST(PendingFile, CopiesAcrossFilesystems) {
  const fs::path memory = "/dev/shm";
  if (::access(memory.c_str(), W_OK) != 0) {
    GTEST_SKIP() << "no second filesystem";
  }
  const TempFolder folder;
  const fs::path other = memory / folder.path().filename();
  fs::create_directory(other);
  const std::string bytes = random_bytes(9'000'001, 3);
  check_copies(folder.write("source", bytes), bytes, other / "target");
  fs::remove_all(other);
}

TEST(PendingFile, ACutSourceIsNamed) {
  const TempFolder folder;
  const MappedFile source = MappedFile::open(folder.write("source", random_bytes(50'000, 5)));
  ASSERT_EQ(::truncate(source.path().c_str(), 100), 0);
  PendingFile file(folder / "target");
  expect_error(ErrorKind::machine, {(folder / "source").string() + ": changed or was cut while it was read"},
               [&] { file.write_at(0, source.bytes()); });
}

TEST(PendingFile, CopyRefusesAShortSource) {
  const TempFolder folder;
  const fs::path source = folder.write("source", "12345");
  PendingFile file(folder / "target");
  expect_error(ErrorKind::input, {"source", "ends too early", "expected 6 bytes", "found 5"},
               [&] { file.copy_at(0, source, 3, 3); });
  expect_error(ErrorKind::input, {"source", "ends too early"}, [&] { file.copy_at(0, source, 6, 0); });
  expect_error(ErrorKind::machine, {"source"}, [&] { file.copy_at(0, source, ~0ULL, 2); });
  expect_error(ErrorKind::input, {"missing"}, [&] { file.copy_at(0, folder / "missing", 0, 1); });
}

TEST(WriteText, WritesAndReplaces) {
  const TempFolder folder;
  write_text(folder / "a", "first, longer");
  write_text(folder / "a", "second");
  EXPECT_EQ(read_bytes(folder / "a"), "second");
  write_text(folder / "empty", "");
  EXPECT_EQ(read_bytes(folder / "empty"), "");
  EXPECT_EQ(entries(folder.path()), 2U);
}

TEST(PendingFile, MayOutliveItsObject) {
  const TempFolder folder;
  const fs::path path = folder / "out";
  expect_error(ErrorKind::input, {"out.partial", "cannot open"}, [&] { PendingFile::reopen(path); });
  {
    PendingFile file(path);
    file.write_at(0, bytes_of("abcdef"));
    file.flush();
    file.keep();
  }
  EXPECT_FALSE(fs::exists(path));
  {
    PendingFile file = PendingFile::reopen(path);
    file.write_at(3, bytes_of("xyz"));
    file.commit();
    EXPECT_THROW(file.flush(), std::logic_error);
  }
  EXPECT_EQ(read_bytes(path), "abcxyz");
  EXPECT_EQ(entries(folder.path()), 1U);
}

TEST(PendingFile, CopiesWhereverBlocksLie) {
  const TempFolder folder;
  const std::string bytes = random_bytes(50'000, 9);
  folder.write("a", bytes);
  for (const std::uint64_t to : {0U, 100U, 4096U, 4196U, 8192U + 5000U}) {
    for (const std::uint64_t from : {0U, 100U, 4096U, 5000U}) {
      PendingFile file(folder / "b");
      file.copy_at(to, folder / "a", from, 40'000);
      file.commit();
      EXPECT_EQ(read_bytes(folder / "b").substr(to), bytes.substr(from, 40'000)) << to << " " << from;
    }
  }
}

TEST(CopyWholeFile, CopiesAndReplaces) {
  const TempFolder folder;
  const std::string bytes = random_bytes(100'003, 4);
  folder.write("a", bytes);
  folder.write("b", "here before");
  folder.write("empty", "");
  copy_whole_file(folder / "a", folder / "b");
  EXPECT_EQ(read_bytes(folder / "b"), bytes);
  copy_whole_file(folder / "empty", folder / "b");
  EXPECT_EQ(read_bytes(folder / "b"), "");
  expect_error(ErrorKind::input, {"missing"}, [&] { copy_whole_file(folder / "missing", folder / "c"); });
  EXPECT_EQ(entries(folder.path()), 3U);
}

// Sets the umask for as long as it lives.
class Umask {
 public:
  explicit Umask(mode_t mask) : before_(::umask(mask)) {}
  Umask(const Umask&) = delete;
  Umask& operator=(const Umask&) = delete;
  ~Umask() { ::umask(before_); }

 private:
  mode_t before_;
};

mode_t mode_of(const fs::path& path) {
  struct stat status {};
  EXPECT_EQ(::stat(path.c_str(), &status), 0) << path;
  return status.st_mode & 07777U;
}

TEST(Permissions, AreWhatTheUmaskLeaves) {
  const TempFolder folder;
  for (const mode_t mask : {0022U, 0077U, 0000U}) {
    const Umask set(mask);
    write_text(folder / "a", "text");
    EXPECT_EQ(mode_of(folder / "a"), 0666U & ~mask);
    fs::remove(folder / "a");
  }
}

TEST(Permissions, AreThoseOfTheSource) {
  const TempFolder folder;
  const Umask set(0022);
  for (const mode_t mode : {0600U, 0640U, 0444U, 0755U, 0666U, 04755U}) {
    const fs::path source = folder.write("source", "text");
    ASSERT_EQ(::chmod(source.c_str(), mode), 0);
    copy_whole_file(source, folder / "copy");
    EXPECT_EQ(mode_of(folder / "copy"), mode & 0777U);
    write_text(folder / "made", "text", permissions_of(source));
    EXPECT_EQ(mode_of(folder / "made"), mode & 0777U);
    fs::remove(source);
  }
  expect_error(ErrorKind::input, {"missing"}, [&] { permissions_of(folder / "missing"); });
}

TEST(Permissions, UnfinishedFilesAreTheirOwnersAlone) {
  const TempFolder folder;
  const FilePermissions all = fs::perms::all;
  folder.write("out.partial", "left over, and open to everybody");
  PendingFile file(folder / "out", all);
  EXPECT_EQ(mode_of(file.partial_path()), 0600U);
  file.commit();
  EXPECT_EQ(mode_of(folder / "out"), 0777U);
}

TEST(Permissions, OfAWriteProtectedSourceAreNoHindranceToGoingOn) {
  const TempFolder folder;
  const FilePermissions read_only = fs::perms::owner_read;
  write_text(folder / "out", "text", read_only);
  fs::rename(folder / "out", folder / "out.partial");
  {
    PendingFile file = PendingFile::reopen(folder / "out", read_only);
    EXPECT_EQ(mode_of(file.partial_path()), 0600U);
    file.commit();
  }
  EXPECT_EQ(mode_of(folder / "out"), 0400U);
  fs::rename(folder / "out", folder / "out.partial");
  PendingFile::reopen(folder / "out").commit();
  EXPECT_EQ(mode_of(folder / "out"), 0600U);
}

TEST(PendingFolder, AppearsOnlyAtCommit) {
  const TempFolder folder;
  for (const std::string& name : {std::string("out"), std::string("with-slash/")}) {
    const fs::path path = folder / name;
    const fs::path bare = folder / name.substr(0, name.find('/'));
    PendingFolder pending(path);
    EXPECT_EQ(pending.staging(), fs::path(bare.string() + ".partial"));
    write_text(pending.staging() / "a", "text");
    EXPECT_FALSE(fs::exists(bare));
    pending.commit();
    EXPECT_EQ(read_bytes(bare / "a"), "text");
    EXPECT_FALSE(fs::exists(pending.staging()));
    EXPECT_THROW(pending.commit(), std::logic_error);
  }
  EXPECT_EQ(entries(folder.path()), 2U);
}

TEST(PendingFolder, LeavesNothingWithoutCommit) {
  const TempFolder folder;
  {
    const PendingFolder pending(folder / "out");
    write_text(pending.staging() / "a", "text");
    fs::create_directory(pending.staging() / "deeper");
  }
  EXPECT_EQ(entries(folder.path()), 0U);
}

TEST(PendingFolder, RefusesATakenName) {
  const TempFolder folder;
  fs::create_directory(folder / "folder");
  folder.write("file", "");
  fs::create_symlink("nowhere", folder / "link");
  fs::create_directory(folder / "left.partial");
  folder.write("left.partial/keep", "x");
  for (const char* name : {"folder", "folder/", "file", "link"}) {
    expect_error(ErrorKind::usage, {"exists already"}, [&] { const PendingFolder pending(folder / name); });
  }
  expect_error(ErrorKind::usage, {"left.partial", "interrupted run", "delete it"},
               [&] { const PendingFolder pending(folder / "left"); });
  EXPECT_EQ(read_bytes(folder / "left.partial/keep"), "x");
  expect_error(ErrorKind::usage, {"parent folder", "does not exist"},
               [&] { const PendingFolder pending(folder / "no/out"); });
  expect_error(ErrorKind::usage, {"parent folder"},
               [&] { const PendingFolder pending(folder / "file/out"); });
  expect_error(ErrorKind::usage, {"empty"}, [&] { const PendingFolder pending(""); });
}

TEST(PendingFolder, ReplacesNothingAtCommit) {
  const TempFolder folder;
  {
    PendingFolder pending(folder / "out");
    write_text(pending.staging() / "a", "text");
    fs::create_directory(folder / "out");
    expect_error(ErrorKind::usage, {"out", "appeared"}, [&] { pending.commit(); });
  }
  EXPECT_EQ(entries(folder / "out"), 0U);
  EXPECT_EQ(entries(folder.path()), 1U);
}

}  // namespace
}  // namespace relatent
