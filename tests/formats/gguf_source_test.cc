#include "formats/gguf_source.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/gguf_bytes.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::TempFolder;
using namespace testing_support::gguf_bytes;

TEST(GgufSource, RefusesTextThatIsNotUtf8) {
  const TempFolder folder;
  const auto open = [&](const Made& made) { return GgufSource::open(folder.write("a.gguf", made.bytes())); };
  EXPECT_EQ(open({.keys = {key("é", 8, text("ü"))}}).config().at("é"), "ü");
  for (const std::string& entry : {key("a", 8, text("\xff")), key("\xc3", 4, u32(1))}) {
    expect_error(ErrorKind::input, {"a.gguf", "key", "UTF-8"}, [&] { open({.keys = {entry}}); });
  }
  expect_error(ErrorKind::input, {"a.gguf", "tensor \xff", "UTF-8"},
               [&] { open({.tensors = {tensor("\xff", {1}, 0, 0)}, .data = letters(4)}); });
  // Tokens may be any bytes.
  EXPECT_TRUE(open({.keys = {key("a", 9, u32(8) + u64(1) + text("\xff"))}}).config().empty());
}

}  // namespace
}  // namespace relatent
