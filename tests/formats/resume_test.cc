#include "formats/resume.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <limits>
#include <string>
#include <thread>

#include "formats/file_identity.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::TempFolder;
using testing_support::tiny_model;

TEST(ExactText, GivesTheNumberBack) {
  for (const double number : {0.1, 1.0 / 3, -2.5e-300, 1e22, std::numeric_limits<double>::denorm_min()}) {
    EXPECT_EQ(std::strtod(exact_text(number).c_str(), nullptr), number);
  }
}

TEST(SourceFacts, ChangeWithAnyFileThatIsRead) {
  const TempFolder folder;
  tiny_model().write(folder / "model");
  folder.write("model/tokenizer.json", "{}");
  const auto facts = [&] {
    RunIdentity out;
    add_source_identity(Checkpoint::open(folder / "model"), out);
    return out;
  };
  const RunIdentity before = facts();
  EXPECT_EQ(difference(before, facts()), "");
  for (const std::string& name :
       {std::string("config.json"), std::string("model.safetensors"), std::string("tokenizer.json")}) {
    const std::filesystem::path path = folder / ("model/" + name);
    const auto time = std::filesystem::last_write_time(path);
    std::filesystem::last_write_time(path, time + std::chrono::nanoseconds(1000));
    EXPECT_NE(difference(before, facts()).find("the source's " + name), std::string::npos);
    std::filesystem::last_write_time(path, time);
    EXPECT_EQ(difference(before, facts()), "");
  }
  folder.write("model/chat_template.jinja", "");
  EXPECT_NE(difference(before, facts()).find("chat_template.jinja was not there"), std::string::npos);
  expect_error(ErrorKind::input, {"missing"}, [&] { file_identity(folder / "missing"); });
}

TEST(SourceFacts, AreThoseOfTheFilesThatWereOpened) {
  const TempFolder folder;
  tiny_model().write(folder / "model");
  for (const char* name : {"config.json", "model.safetensors"}) {
    const Checkpoint source = Checkpoint::open(folder / "model");
    RunIdentity facts;
    EXPECT_NO_THROW(add_source_identity(source, facts));
    // As many bytes, at another time.
    const std::filesystem::path path = folder / "model" / name;
    std::filesystem::copy_file(path, folder / "beside");
    std::filesystem::rename(folder / "beside", path);
    expect_error(ErrorKind::input, {"a file changed while it was read", name},
                 [&] { add_source_identity(source, facts); });
  }
}

TEST(FileIdentity, IsTakenWhenAFurtherChangeWouldShow) {
  const TempFolder folder;
  folder.write("file", "text");
  const std::string identity = file_identity(folder / "file");
  const auto age = std::chrono::file_clock::now() - std::filesystem::last_write_time(folder / "file");
  EXPECT_GE(age, std::chrono::milliseconds(20));
  EXPECT_EQ(file_identity(folder / "file"), identity);
  // Of another machine whose clock is ahead: not waited for.
  std::filesystem::last_write_time(folder / "file", std::chrono::file_clock::now() + std::chrono::hours(24));
  EXPECT_NE(file_identity(folder / "file"), identity);
}

TEST(SourceFacts, MustStayAsTheyWere) {
  const RunIdentity before = {{"--rank", "4"}, {"the source's config.json", "1 bytes"}};
  EXPECT_NO_THROW(require_unchanged(before, before));
  EXPECT_NO_THROW(require_unchanged(before, {{"the source's README.md", "2 bytes"}}));
  expect_error(ErrorKind::input,
               {"a file changed while it was read", "config.json was 1 bytes and is 3 bytes now"}, [&] {
                 require_unchanged(before, {{"the source's config.json", "3 bytes"}});
               });
}

TEST(SaveClock, SavesWhenItIsTime) {
  SaveClock always(0);
  EXPECT_TRUE(always.due());
  always.save([] {});
  EXPECT_TRUE(always.due());
  SaveClock rarely(3600);
  EXPECT_FALSE(rarely.due());
  // A slow save is not repeated at once.
  SaveClock slow(1e-9);
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(slow.due());
  slow.save([] { std::this_thread::sleep_for(std::chrono::milliseconds(200)); });
  EXPECT_FALSE(slow.due());
}

}  // namespace
}  // namespace relatent
