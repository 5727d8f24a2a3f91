#include "formats/process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "formats/error.h"
#include "formats/files.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::read_bytes;
using testing_support::TempFolder;

// Does something as a process of its own, which says on stderr and in its exit code what it threw.
template <typename Body>
[[noreturn]] void end_with(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    std::_Exit(error.exit_code());
  }
  std::_Exit(0);
}

void redirect_stdout(const char* path) {
  const int file = ::open(path, O_WRONLY);
  ::dup2(file, STDOUT_FILENO);
}

TEST(ProcessDeathTest, AFileBeyondTheLimitIsAnError) {
  const TempFolder folder;
  const auto write = [&] {
    prepare_process();
    const rlimit limit{1000, 1000};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
    PendingFile file(folder / "out");
    file.write_at(0, std::vector<std::byte>(2000));
  };
  EXPECT_EXIT(end_with(write), testing::ExitedWithCode(4), "out.partial: cannot write: File too large");
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

TEST(ProcessDeathTest, WhatCannotBePrintedIsAnError) {
  const auto print = [](std::size_t size) {
    redirect_stdout("/dev/full");
    std::fputs(std::string(size, 'x').c_str(), stdout);
    finish_stdout();
  };
  EXPECT_EXIT(end_with([&] { print(10); }), testing::ExitedWithCode(4),
              "cannot write to the standard output: No space");
  // Refused before the end already.
  EXPECT_EXIT(end_with([&] { print(1'000'000); }), testing::ExitedWithCode(4),
              "cannot write to the standard output");
  EXPECT_EXIT(end_with([&] {
                redirect_stdout("/dev/full");
                std::cout << "some";
                finish_stdout();
              }),
              testing::ExitedWithCode(4), "cannot write to the standard output");
  EXPECT_EXIT(end_with([&] {
                redirect_stdout("/dev/null");
                std::cout << "some";
                finish_stdout();
              }),
              testing::ExitedWithCode(0), "");
}

TEST(ProcessDeathTest, ClosedStreamsAreNotTakenByFiles) {
  const TempFolder folder;
  const auto print = [&] {
    ::close(STDIN_FILENO);
    ::close(STDOUT_FILENO);
    prepare_process();
    PendingFile file(folder / "out");
    std::puts("some");
    std::fflush(stdout);
    file.commit();
    finish_stdout();
  };
  EXPECT_EXIT(end_with(print), testing::ExitedWithCode(4), "cannot write to the standard output");
  EXPECT_EQ(read_bytes(folder / "out"), "");
}

}  // namespace
}  // namespace relatent
