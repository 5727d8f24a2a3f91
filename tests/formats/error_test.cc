#include "formats/error.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <string>
#include <vector>

#include "tests/support/expect_error.h"

namespace relatent {
namespace {

using testing_support::expect_error;

TEST(Error, CarriesKindAndExitCode) {
  EXPECT_EQ(Error(ErrorKind::usage, "a").exit_code(), 2);
  EXPECT_EQ(Error(ErrorKind::input, "a").exit_code(), 3);
  EXPECT_EQ(Error(ErrorKind::machine, "a").exit_code(), 4);
  EXPECT_STREQ(Error(ErrorKind::usage, "a sentence").what(), "a sentence");
}

TEST(Error, SentenceHoldsThePartsThatAreThere) {
  struct Case {
    Complaint complaint;
    std::string sentence;
  };
  const std::vector<Case> cases = {
      {{.file = "a.safetensors",
        .tensor = "w",
        .problem = "shape",
        .expected = "[2, 3]",
        .found = "[3, 2]",
        .next_step = "transpose it"},
       "a.safetensors: tensor w: shape: expected [2, 3], found [3, 2] (transpose it)"},
      {{.file = "f", .problem = "is empty"}, "f: is empty"},
      {{.file = "f", .expected = "x"}, "f: expected x"},
      {{.file = "f", .found = "y"}, "f: found y"},
      {{.file = "f", .tensor = "t", .expected = "x", .found = "y"}, "f: tensor t: expected x, found y"},
      {{.problem = "p", .next_step = "n"}, "p (n)"},
      {{}, ""},
  };
  for (const Case& test : cases) {
    EXPECT_EQ(to_sentence(test.complaint), test.sentence);
  }
}

TEST(Error, SentenceStaysOneShortLine) {
  EXPECT_EQ(to_sentence({.file = "f", .tensor = "a\nb\x01\x7f", .problem = "p"}),
            "f: tensor a\\nb\\x01\\x7f: p");
  const std::string sentence = to_sentence({.file = "f", .tensor = std::string(100000, 'x')});
  EXPECT_LT(sentence.size(), 400U);
  EXPECT_TRUE(sentence.ends_with("..."));
  // A name is not cut inside a character: 299 letters and a two-byte one.
  const std::string cut = to_sentence({.tensor = std::string(299, 'x') + "\xc3\xa9\xc3\xa9"});
  EXPECT_EQ(cut, "tensor " + std::string(299, 'x') + "...");
}

TEST(Error, FailFunctionsChooseTheKind) {
  expect_error(ErrorKind::input, {"f: tensor t: p"},
               [] { fail_input({.file = "f", .tensor = "t", .problem = "p"}); });
  expect_error(ErrorKind::usage, {"no such option"}, [] { fail_usage("no such option"); });
  for (const int number : {ENOENT, ENOTDIR, EISDIR}) {
    expect_error(ErrorKind::input, {"f: cannot open: "},
                 [number] { fail_system("f", "cannot open", number); });
  }
  for (const int number : {ENOSPC, EACCES, EIO, ENOMEM}) {
    expect_error(ErrorKind::machine, {"f: cannot open: "},
                 [number] { fail_system("f", "cannot open", number); });
  }
  expect_error(ErrorKind::machine, {"No space left on device"}, [] { fail_system("f", "write", ENOSPC); });
}

}  // namespace
}  // namespace relatent
