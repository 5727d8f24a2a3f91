#include "formats/json_text.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::TempFolder;

std::string nested(std::size_t depth) {
  return std::string(depth, '[') + std::string(depth, ']');
}

TEST(JsonText, KeepsValuesAndOrder) {
  const std::vector<std::string> texts = {
      "{}",
      "[]",
      "null",
      R"({"z":1,"a":{"y":[1,-2,2.5,true,false,null,"é\n"],"b":{}},"m":[[],[{"k":18446744073709551615}]]})",
      nested(kDeepestJson),
  };
  for (const std::string& text : texts) {
    EXPECT_EQ(parse_json("f", text).dump(), nlohmann::ordered_json::parse(text).dump());
  }
  EXPECT_EQ(parse_json("f", " \n{\"b\": 1, \"a\": 2}\t\r\n ").dump(), R"({"b":1,"a":2})");
}

TEST(JsonText, RefusesWhatIsNotClearJson) {
  struct Case {
    std::string text;
    std::string part;
  };
  const std::vector<Case> cases = {
      {"", "not valid JSON"},
      {"{", "not valid JSON"},
      {"{} x", "not valid JSON"},
      {"{}{}", "not valid JSON"},
      {R"({"a":1,})", "not valid JSON"},
      {R"({"a":NaN})", "not valid JSON"},
      {"{'a':1}", "not valid JSON"},
      {"{\"a\":\"\xff\"}", "not valid JSON"},
      {"{\"a\":\"\xc3\"}", "not valid JSON"},
      {"// comment\n{}", "not valid JSON"},
      {std::string("{}\0{}", 5), "a NUL at byte 3"},
      {R"({"a":1,"a":1})", "\"a\" appears twice"},
      {R"({"x":[{"a":1,"b":2,"a":{}}]})", "\"a\" appears twice"},
      {R"({"a":1,"\u0061":2})", "\"a\" appears twice"},
      {nested(kDeepestJson + 1), "nested too deeply"},
      {std::string(1'000'000, '['), "nested too deeply"},
      {R"({"a":1e999})", "not valid JSON"},
  };
  for (const Case& test : cases) {
    expect_error(ErrorKind::input, {"some.json", test.part}, [&] { parse_json("some.json", test.text); });
  }
}

TEST(JsonText, EveryCutIsRefused) {
  const std::string text = R"({"z":1,"a":{"y":[1,-2,2.5,true,null,"é\n"]}})";
  for (std::size_t size = 0; size < text.size(); ++size) {
    expect_error(ErrorKind::input, {"f: not valid JSON"}, [&] { parse_json("f", text.substr(0, size)); });
  }
}

TEST(JsonText, LargeObjectsTakeNoQuadraticTime) {
  std::string text = "{";
  for (int i = 0; i < 300'000; ++i) {
    text += (i == 0 ? "\"" : ",\"") + std::to_string(i) + "\":" + std::to_string(i);
  }
  EXPECT_EQ(parse_json("f", text + "}").size(), 300'000U);
}

TEST(JsonText, KnowsWhatIsUtf8) {
  EXPECT_TRUE(is_utf8(""));
  EXPECT_TRUE(is_utf8("aé\n"));
  EXPECT_FALSE(is_utf8("a\xff"));
  EXPECT_FALSE(is_utf8("\xc3"));
}

TEST(JsonText, FilesMustHoldAnObject) {
  const TempFolder folder;
  EXPECT_EQ(read_json_object(folder.write("a.json", R"({"a":1})"), 7).at("a"), 1);
  expect_error(ErrorKind::input, {"b.json", "expected a JSON object", "found a JSON array"},
               [&] { read_json_object(folder.write("b.json", "[1]"), 100); });
  expect_error(ErrorKind::input, {"c.json", "too large"},
               [&] { read_json_object(folder.write("c.json", R"({"a":1})"), 6); });
  expect_error(ErrorKind::input, {"d.json"}, [&] { read_json_object(folder / "d.json", 6); });
}

}  // namespace
}  // namespace relatent
