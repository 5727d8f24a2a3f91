#include "formats/work_folder.h"

#include <gtest/gtest.h>

#include <new>
#include <string>

#include "formats/error.h"
#include "formats/files.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::expect_error;
using testing_support::read_bytes;
using testing_support::TempFolder;

const RunIdentity kFacts = {{"--rank", "192"}, {"the program", "relatent 1"}};

class Work : public testing::Test {
 protected:
  fs::path out() const { return folder_ / "out"; }
  fs::path partial() const { return folder_ / "out.partial"; }
  std::unique_ptr<WorkFolder> open(bool resume = false, OutputKind kind = OutputKind::new_folder,
                                   const RunIdentity& facts = kFacts) const {
    return std::make_unique<WorkFolder>(out(), kind, facts, resume);
  }
  // Leaves an unfinished run behind.
  void interrupt(OutputKind kind = OutputKind::new_folder) const {
    const auto work = open(false, kind);
    expect_error(ErrorKind::machine, {"disk full", "out.partial", "--resume"}, [&] {
      work->run([&] {
        work->record("layers", 3);
        throw Error(ErrorKind::machine, "disk full");
      });
    });
  }
  std::ptrdiff_t entries() const {
    return std::distance(fs::directory_iterator(folder_.path()), fs::directory_iterator());
  }

  TempFolder folder_;
};

TEST_F(Work, AFolderAppearsOnlyAtCommit) {
  {
    const auto work = open();
    EXPECT_FALSE(work->resumed());
    EXPECT_FALSE(work->complete());
    write_text(work->output() / "a", "text");
    write_text(work->file("side"), "not for the output");
    EXPECT_FALSE(fs::exists(out()));
    work->commit();
  }
  EXPECT_EQ(read_bytes(out() / "a"), "text");
  EXPECT_EQ(entries(), 1);
}

TEST_F(Work, AFileMayReplaceAnother) {
  write_text(out(), "old");
  {
    const auto work = open(false, OutputKind::file);
    write_text(work->output(), "new");
    EXPECT_EQ(read_bytes(out()), "old");
    work->commit();
  }
  EXPECT_EQ(read_bytes(out()), "new");
  EXPECT_EQ(entries(), 1);
}

TEST_F(Work, LeavesNothingThatIsNotWorthKeeping) {
  { const auto work = open(); }
  EXPECT_EQ(entries(), 0);
  {
    const auto work = open();
    expect_error(ErrorKind::machine, {"disk full"},
                 [&] { work->run([] { throw Error(ErrorKind::machine, "disk full"); }); });
  }
  EXPECT_EQ(entries(), 0);
  {
    const auto work = open();
    work->record("layers", 3);
    expect_error(ErrorKind::input, {"not a number"},
                 [&] { work->run([] { throw Error(ErrorKind::input, "not a number"); }); });
  }
  EXPECT_EQ(entries(), 0);
}

TEST_F(Work, IsTakenUpWithItsJournal) {
  interrupt();
  {
    const auto work = open(true);
    EXPECT_TRUE(work->resumed());
    EXPECT_EQ(work->journal().last_number("layers"), 3);
    EXPECT_THROW(work->run([] { throw std::bad_alloc(); }), Error);
  }
  const auto work = open(true);
  EXPECT_TRUE(work->resumed());
  work->commit();
  EXPECT_TRUE(fs::is_directory(out()));
}

TEST_F(Work, NothingToResumeJustStarts) {
  { const auto work = open(true); }
  EXPECT_EQ(entries(), 0);
  // Ended before there was a journal.
  fs::create_directories(partial() / "output");
  write_text(partial() / "journal.partial", "relat");
  {
    const auto work = open(true);
    EXPECT_FALSE(work->resumed());
    work->commit();
  }
  EXPECT_TRUE(fs::exists(out()));
  EXPECT_EQ(entries(), 1);
}

TEST_F(Work, UnfinishedRunsAreRefusedWithoutResume) {
  interrupt();
  expect_error(ErrorKind::usage, {"out.partial", "interrupted run", "--resume", "delete it"},
               [&] { open(); });
  EXPECT_TRUE(open(true)->resumed());
}

TEST_F(Work, OtherRunsAreRefused) {
  interrupt();
  expect_error(ErrorKind::usage, {"out.partial", "--rank was 192 and is 128 now"}, [&] {
    open(true, OutputKind::new_folder, {{"--rank", "128"}, {"the program", "relatent 1"}});
  });
  expect_error(ErrorKind::usage, {"the program was relatent 1 and is relatent 2 now"}, [&] {
    open(true, OutputKind::new_folder, {{"--rank", "192"}, {"the program", "relatent 2"}});
  });
  {
    const auto held = open(true);
    expect_error(ErrorKind::usage, {"out.partial", "another run"}, [&] { open(true); });
    expect_error(ErrorKind::usage, {"out.partial", "another run"}, [&] { open(false); });
    EXPECT_THROW(held->run([] { throw std::bad_alloc(); }), Error);
  }
  EXPECT_TRUE(fs::exists(partial() / "journal"));
}

TEST_F(Work, ForeignFoldersAreLeftAlone) {
  fs::create_directory(partial());
  write_text(partial() / "precious", "data");
  expect_error(ErrorKind::usage, {"out.partial", "interrupted run"}, [&] { open(); });
  expect_error(ErrorKind::usage, {"out.partial", "precious", "no journal"}, [&] { open(true); });
  write_text(partial() / "journal", "dear diary\n");
  expect_error(ErrorKind::usage, {"not a journal", "delete"}, [&] { open(true); });
  EXPECT_EQ(read_bytes(partial() / "precious"), "data");
  EXPECT_EQ(read_bytes(partial() / "journal"), "dear diary\n");
  fs::remove_all(partial());
  write_text(partial(), "a file");
  expect_error(ErrorKind::usage, {"out.partial", "in the way"}, [&] { open(true); });
  EXPECT_EQ(read_bytes(partial()), "a file");
}

TEST_F(Work, NothingIsWrittenThroughALink) {
  interrupt();
  fs::remove(partial() / "output");
  fs::create_directory(folder_ / "precious");
  fs::create_directory_symlink(folder_ / "precious", partial() / "output");
  expect_error(ErrorKind::usage, {"output", "in the way"}, [&] { open(true); });
  EXPECT_TRUE(fs::is_symlink(partial() / "output"));
  EXPECT_TRUE(fs::exists(partial() / "journal"));
}

TEST_F(Work, TakenNamesAreRefused) {
  fs::create_directory(out());
  for (const bool resume : {false, true}) {
    expect_error(ErrorKind::usage, {"out", "exists already"}, [&] { open(resume); });
    expect_error(ErrorKind::usage, {"out", "is a folder"}, [&] { open(resume, OutputKind::file); });
  }
  EXPECT_EQ(entries(), 1);
  expect_error(ErrorKind::usage, {"parent folder"},
               [&] { const WorkFolder work(folder_ / "no/out", OutputKind::file, kFacts, true); });
  // It appears while the run is under way.
  fs::remove(out());
  {
    const auto work = open();
    fs::create_directory(out());
    expect_error(ErrorKind::usage, {"appeared"}, [&] { work->run([&] { work->commit(); }); });
  }
  expect_error(ErrorKind::usage, {"exists already"}, [&] { open(true); });
  fs::remove(out());
  const auto work = open(true);
  EXPECT_FALSE(work->complete()) << "it lay there unguarded";
  work->commit();
  EXPECT_TRUE(fs::exists(out()));
}

TEST_F(Work, AFileReplacesNothingButAFile) {
  write_text(folder_ / "precious", "data");
  fs::create_symlink("precious", out());
  for (const bool resume : {false, true}) {
    expect_error(ErrorKind::usage, {out().string(), "is a symbolic link"},
                 [&] { open(resume, OutputKind::file); });
  }
  EXPECT_EQ(entries(), 2);
  fs::remove(out());
  {
    const auto work = open(false, OutputKind::file);
    write_text(work->output(), "new");
    fs::create_symlink("precious", out());
    expect_error(ErrorKind::usage, {out().string(), "is a symbolic link"}, [&] { work->commit(); });
  }
  EXPECT_TRUE(fs::is_symlink(out()));
  EXPECT_EQ(read_bytes(folder_ / "precious"), "data");
}

TEST_F(Work, EndsBetweenTheLastStepsAreTidiedUp) {
  for (const OutputKind kind : {OutputKind::new_folder, OutputKind::file}) {
    for (const bool renamed : {false, true}) {
      interrupt(kind);
      Journal::open(partial() / "journal").append("complete", "");
      if (kind == OutputKind::file) {
        write_text(partial() / "output", "text");
      } else {
        write_text(partial() / "output/a", "text");
      }
      if (renamed) {
        fs::rename(partial() / "output", out());
      }
      {
        const auto work = open(true, kind);
        EXPECT_EQ(work->complete(), renamed);
        work->commit();
      }
      EXPECT_EQ(read_bytes(kind == OutputKind::file ? out() : out() / "a"), "text");
      EXPECT_EQ(entries(), 1);
      fs::remove_all(out());
    }
  }
  // Between the removal of the journal and of the folder: there is nothing to say whose output that is.
  fs::create_directory(out());
  fs::create_directory(partial());
  expect_error(ErrorKind::usage, {"out", "exists already"}, [&] { open(true); });
  EXPECT_EQ(entries(), 1);
}

}  // namespace
}  // namespace relatent
