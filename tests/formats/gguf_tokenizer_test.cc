#include "formats/gguf_tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

using nlohmann::ordered_json;
using testing_support::expect_error;
using testing_support::TempFolder;

// Five tokens in the vocabulary, one of them added as well, and two behind it.
ordered_json small() {
  return ordered_json::parse(R"({
    "added_tokens": [
      {"id": 0, "content": "<s>", "special": true},
      {"id": 5, "content": "<tool▁call>", "special": false},
      {"id": 6, "content": "<|end|>", "special": false}],
    "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "post_processor": null,
    "model": {"type": "BPE", "continuing_subword_prefix": null, "end_of_word_suffix": "",
              "vocab": {"<s>": 0, "a": 1, "Ġ": 2, "Ġa": 3, "Ġaa": 4},
              "merges": [["Ġ", "a"], ["Ġa", "a"]]}})");
}

GgufMetadata made(const TempFolder& folder, const ordered_json& tokenizer, const std::string& config = "{}",
                  const std::string& pre = "", std::int64_t vocab_size = 9) {
  folder.write("tokenizer.json", tokenizer.dump());
  return gguf_tokenizer(folder.path(), ordered_json::parse(config), pre, vocab_size);
}

// The value of a key, which has to have that type.
template <typename T>
T at(const GgufMetadata& metadata, const std::string& key) {
  for (const auto& [name, value] : metadata) {
    if (name == key) {
      const T* typed = std::get_if<T>(&value);
      EXPECT_NE(typed, nullptr) << key << " is " << gguf_type_name(value);
      return typed == nullptr ? T{} : *typed;
    }
  }
  ADD_FAILURE() << "no key " << key;
  return {};
}

bool contains(const GgufMetadata& metadata, const std::string& key) {
  return std::any_of(metadata.begin(), metadata.end(), [&](const auto& entry) { return entry.first == key; });
}

TEST(GgufTokenizer, SaysWhatIsWhat) {
  const TempFolder folder;
  const GgufMetadata expected = {
      {"tokenizer.ggml.model", std::string("gpt2")},
      {"tokenizer.ggml.pre", std::string("gpt-2")},
      {"tokenizer.ggml.tokens",
       std::vector<std::string>{"<s>", "a", "Ġ", "Ġa", "Ġaa", "<tool call>", "<|end|>", "[PAD7]", "[PAD8]"}},
      {"tokenizer.ggml.token_type", std::vector<std::int32_t>{3, 1, 1, 1, 1, 4, 3, 5, 5}},
      {"tokenizer.ggml.merges", std::vector<std::string>{"Ġ a", "Ġa a"}},
      {"tokenizer.ggml.bos_token_id", std::uint32_t{0}},
      {"tokenizer.ggml.eos_token_id", std::uint32_t{6}},
      {"tokenizer.ggml.add_bos_token", false},
      {"tokenizer.ggml.add_eos_token", false}};
  EXPECT_EQ(made(folder, small(), R"({"bos_token_id": 0, "eos_token_id": 6})"), expected);
}

TEST(GgufTokenizer, TakesMergesOfBothSpellings) {
  const TempFolder folder;
  ordered_json tokenizer = small();
  tokenizer["model"]["merges"] = {"Ġ a", ordered_json::array({"Ġa", "a"})};
  const std::vector<std::string> expected = {"Ġ a", "Ġa a"};
  EXPECT_EQ(at<std::vector<std::string>>(made(folder, tokenizer), "tokenizer.ggml.merges"), expected);
  // A space inside of a part is spelled as bytes are.
  tokenizer["model"]["vocab"]["a b"] = 5;
  tokenizer["model"]["vocab"]["a ba"] = 6;
  tokenizer["added_tokens"] = ordered_json::array();
  tokenizer["model"]["merges"] = ordered_json::array({ordered_json::array({"a b", "a"})});
  EXPECT_EQ(at<std::vector<std::string>>(made(folder, tokenizer), "tokenizer.ggml.merges"),
            (std::vector<std::string>{"aĠb a"}));
  tokenizer["model"]["merges"] = ordered_json::array();
  EXPECT_TRUE(at<std::vector<std::string>>(made(folder, tokenizer), "tokenizer.ggml.merges").empty());
}

TEST(GgufTokenizer, FindsSpecialTokens) {
  const TempFolder folder;
  const auto id = [&](const std::string& config, const char* key) {
    const GgufMetadata metadata = made(folder, small(), config);
    return contains(metadata, key) ? static_cast<int>(at<std::uint32_t>(metadata, key)) : -1;
  };
  constexpr const char* kEos = "tokenizer.ggml.eos_token_id";
  constexpr const char* kPad = "tokenizer.ggml.padding_token_id";
  EXPECT_EQ(id("{}", kEos), -1);
  EXPECT_EQ(id(R"({"eos_token_id": null})", kEos), -1);
  EXPECT_EQ(id(R"({"eos_token_id": [6, 3]})", kEos), 6);
  EXPECT_EQ(id(R"({"eos_token_id": []})", kEos), -1);
  EXPECT_EQ(id(R"({"text_config": {"eos_token_id": 4}})", kEos), 4);
  EXPECT_EQ(id(R"({"pad_token_id": 8})", kPad), 8);
  EXPECT_EQ(id(R"({"pad_token_id": 9})", kPad), -1);
  EXPECT_EQ(id(R"({"pad_token_id": -1})", kPad), -1);
  // Names come before ids.
  folder.write(
      "tokenizer_config.json",
      R"({"eos_token": {"content": "<|end|>"}, "pad_token": "<tool▁call>", "unk_token": "missing"})");
  EXPECT_EQ(id(R"({"eos_token_id": 3})", kEos), 6);
  EXPECT_EQ(id(R"({"pad_token_id": 3})", kPad), 5);
  EXPECT_EQ(id(R"({"unk_token_id": 3})", "tokenizer.ggml.unknown_token_id"), 3);
  EXPECT_EQ(id("{}", "tokenizer.ggml.unknown_token_id"), -1);
}

TEST(GgufTokenizer, AddsWhatTheTokenizerAdds) {
  const TempFolder folder;
  const auto adds = [&](const ordered_json& tokenizer, const std::string& config = R"({"bos_token_id": 0})") {
    return at<bool>(made(folder, tokenizer, config), "tokenizer.ggml.add_bos_token");
  };
  ordered_json tokenizer = small();
  EXPECT_FALSE(adds(tokenizer));
  const ordered_json processor = ordered_json::parse(R"({"type": "TemplateProcessing", "single": [
    {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]})");
  tokenizer["post_processor"] = processor;
  EXPECT_TRUE(adds(tokenizer));
  // Named by nothing but the template.
  EXPECT_EQ(at<std::uint32_t>(made(folder, tokenizer), "tokenizer.ggml.bos_token_id"), 0U);
  EXPECT_TRUE(adds(tokenizer, "{}"));
  // llama.cpp would add another token than this tokenizer does.
  EXPECT_FALSE(adds(tokenizer, R"({"bos_token_id": 1})"));
  tokenizer["post_processor"] = {{"type", "Sequence"},
                                 {"processors", {ordered_json{{"type", "ByteLevel"}}, processor}}};
  EXPECT_TRUE(adds(tokenizer));
  folder.write("tokenizer_config.json", R"({"add_bos_token": false})");
  EXPECT_FALSE(adds(tokenizer));
  folder.write("tokenizer_config.json", R"({"add_bos_token": true, "add_eos_token": true})");
  EXPECT_TRUE(adds(small()));
  // No token to add.
  EXPECT_FALSE(adds(small(), "{}"));
  EXPECT_FALSE(at<bool>(made(folder, small()), "tokenizer.ggml.add_eos_token"));
  EXPECT_TRUE(at<bool>(made(folder, small(), R"({"eos_token_id": 6})"), "tokenizer.ggml.add_eos_token"));
}

TEST(GgufTokenizer, CarriesTheChatTemplate) {
  const TempFolder folder;
  constexpr const char* kKey = "tokenizer.chat_template";
  EXPECT_FALSE(contains(made(folder, small()), kKey));
  folder.write("tokenizer_config.json", R"({"chat_template": "{{ one }}"})");
  EXPECT_EQ(at<std::string>(made(folder, small()), kKey), "{{ one }}");
  folder.write(
      "tokenizer_config.json",
      R"({"chat_template": [{"name": "x", "template": "X"}, {"name": "default", "template": "D"}]})");
  EXPECT_EQ(at<std::string>(made(folder, small()), kKey), "D");
  folder.write("chat_template.jinja", "{{ two }}\n");
  EXPECT_EQ(at<std::string>(made(folder, small()), kKey), "{{ two }}\n");
}

TEST(GgufTokenizer, KnowsSomeWaysToCutText) {
  const TempFolder folder;
  const auto pre = [&](const ordered_json& pre_tokenizer, bool ignore_merges = false) {
    ordered_json tokenizer = small();
    tokenizer["pre_tokenizer"] = pre_tokenizer;
    tokenizer["model"]["ignore_merges"] = ignore_merges;
    return at<std::string>(made(folder, tokenizer), "tokenizer.ggml.pre");
  };
  const auto byte_level = [](bool use_regex) {
    return ordered_json{
        {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
  };
  const auto sequence = [](const ordered_json& first, const ordered_json& second) {
    return ordered_json{{"type", "Sequence"}, {"pretokenizers", ordered_json::array({first, second})}};
  };
  const auto split = [](const std::string& digits) {
    return ordered_json{{"type", "Split"},
                        {"pattern",
                         {{"Regex", R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|)" + digits +
                                        R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}}},
                        {"behavior", "Isolated"},
                        {"invert", false}};
  };
  const ordered_json digits = {{"type", "Digits"}, {"individual_digits", true}};
  const ordered_json llama3 = sequence(split(R"(\p{N}{1,3})"), byte_level(false));
  EXPECT_EQ(pre(byte_level(true)), "gpt-2");
  EXPECT_EQ(pre(sequence(digits, byte_level(true))), "smollm");
  EXPECT_EQ(pre(sequence(split(R"(\p{N})"), byte_level(false))), "qwen2");
  EXPECT_EQ(pre(llama3, true), "llama-bpe");
  EXPECT_EQ(pre(llama3), "smaug-bpe");

  ordered_json spaced = byte_level(true);
  spaced["add_prefix_space"] = true;
  ordered_json removing = split(R"(\p{N})");
  removing["behavior"] = "Removed";
  const std::vector<ordered_json> unknown = {spaced,
                                             byte_level(false),
                                             sequence(split(R"(\p{N}{1,2})"), byte_level(false)),
                                             sequence(split(R"(\p{N})"), byte_level(true)),
                                             sequence(removing, byte_level(false)),
                                             sequence({{"type", "Digits"}}, byte_level(true)),
                                             sequence(digits, byte_level(false)),
                                             sequence(byte_level(true), digits)};
  for (const ordered_json& one : unknown) {
    SCOPED_TRACE(one.dump());
    expect_error(ErrorKind::input, {"tokenizer.json: ", "cuts text", "no_vocab"}, [&] { pre(one); });
  }
  expect_error(ErrorKind::input, {"cuts text"}, [&] { pre(byte_level(true), true); });

  // A name that is given is taken.
  ordered_json tokenizer = small();
  tokenizer["pre_tokenizer"] = byte_level(false);
  EXPECT_EQ(at<std::string>(made(folder, tokenizer, "{}", "deepseek-llm"), "tokenizer.ggml.pre"),
            "deepseek-llm");
}

TEST(GgufTokenizer, RefusesWhatIsNotByteLevelBpe) {
  const TempFolder folder;
  const auto refused = [&](const std::string& found, const std::string& model,
                           const std::string& pre_tokenizer) {
    SCOPED_TRACE(found);
    ordered_json tokenizer = small();
    tokenizer["model"] = ordered_json::parse(model);
    tokenizer["pre_tokenizer"] = ordered_json::parse(pre_tokenizer);
    expect_error(ErrorKind::input,
                 {"tokenizer.json: ", "expected byte-level BPE", "found " + found, "no_vocab"},
                 [&] { made(folder, tokenizer, "{}", "default"); });
  };
  const std::string bytes = R"({"type": "ByteLevel"})";
  refused("Unigram", R"({"type": "Unigram", "vocab": [["a", 0.0]]})", R"({"type": "Metaspace"})");
  refused("WordPiece", R"({"type": "WordPiece", "vocab": {}})", "null");
  refused("none", "{}", bytes);
  refused("none", "null", bytes);
  refused("BPE over characters with byte_fallback",
          R"({"type": "BPE", "byte_fallback": true, "vocab": {}, "merges": []})", "null");
  refused("BPE over characters", R"({"vocab": {}, "merges": []})", R"({"type": "Whitespace"})");
  refused("BPE with a end_of_word_suffix",
          R"({"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {}, "merges": []})", bytes);
  const TempFolder empty;
  expect_error(ErrorKind::input, {empty.path().string(), "no tokenizer.json", "no_vocab"},
               [&] { gguf_tokenizer(empty.path(), {}, "", 9); });
}

TEST(GgufTokenizer, RefusesContradictions) {
  const TempFolder folder;
  const auto refused = [&](const std::vector<std::string>& parts, const char* pointer,
                           const ordered_json& value) {
    SCOPED_TRACE(pointer + value.dump());
    ordered_json tokenizer = small();
    tokenizer[ordered_json::json_pointer(pointer)] = value;
    std::vector<std::string> all = parts;
    all.emplace_back("tokenizer.json: ");
    expect_error(ErrorKind::input, all, [&] { made(folder, tokenizer); });
  };
  refused({"the id of token \"a\"", "below 9", "found 9"}, "/model/vocab/a", 9);
  refused({"the id of token \"a\"", "found -1"}, "/model/vocab/a", -1);
  refused({"the id of token \"a\"", "found \"1\""}, "/model/vocab/a", "1");
  refused({"token id 2 is given to \"a\" and \"Ġ\""}, "/model/vocab/a", 2);
  refused({"the vocabulary", "found array"}, "/model/vocab", ordered_json::array());
  refused({"the vocabulary", "found nothing"}, "/model/vocab", nullptr);
  refused({"the id of token \"<|end|>\"", "below 9"}, "/added_tokens/2/id", 9);
  refused({R"(token id 1 is given to "a" and "<|end|>")"}, "/added_tokens/2/id", 1);
  refused({"token id 5 is given to"}, "/added_tokens/2/id", 5);
  refused({"the added token \"<s>\"", "expected 0", "found 7"}, "/added_tokens/0/id", 7);
  refused({"an added token", "an id and a content"}, "/added_tokens/0", 7);
  refused({"added_tokens", "an array", "found object"}, "/added_tokens", ordered_json::object());
  refused({"\"[PAD8]\" stands for two tokens"}, "/added_tokens/2/content", "[PAD8]");
  refused({"merges", "found nothing"}, "/model/merges", nullptr);
  refused({"merge 0", "found \"Ġa\""}, "/model/merges/0", "Ġa");
  refused({"merge 1", "found \"Ġ  a\""}, "/model/merges/1", "Ġ  a");
  refused({"merge 1", "found [\"a\"]"}, "/model/merges/1", ordered_json::array({"a"}));
  refused({"merge 1", "tokens of the vocabulary", "found \"b\""}, "/model/merges/1", "a b");
  refused({"merge 0", "tokens of the vocabulary", "found \"aa\""}, "/model/merges/0", "a a");
  for (const std::int64_t vocab_size : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 31U}) {
    EXPECT_THROW(made(folder, small(), "{}", "", vocab_size), std::invalid_argument);
  }
  expect_error(ErrorKind::input, {"below 4"}, [&] { made(folder, small(), "{}", "", 4); });
  folder.write("tokenizer.json", "{");
  expect_error(ErrorKind::input, {"tokenizer.json", "not valid JSON"},
               [&] { gguf_tokenizer(folder.path(), {}, "", 9); });
}

TEST(GgufTokenizer, CanBeLeftOut) {
  EXPECT_EQ(gguf_no_vocab(), (GgufMetadata{{"tokenizer.ggml.model", std::string("no_vocab")}}));
}

}  // namespace
}  // namespace relatent
