#include "formats/gguf_tokenizer.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/files.h"
#include "formats/json_text.h"

namespace relatent {
namespace {

using nlohmann::ordered_json;

// More bytes than any tokenizer takes.
constexpr std::size_t kLargestTokenizer = std::size_t{256} << 20U;
constexpr std::size_t kLargestTemplate = std::size_t{16} << 20U;

constexpr const char* kWayOut = "write the file without a tokenizer: no_vocab";

// llama.cpp's numbers for kinds of tokens.
constexpr std::int32_t kNormal = 1;
constexpr std::int32_t kControl = 3;
constexpr std::int32_t kUserDefined = 4;
constexpr std::int32_t kUnused = 5;

// How Llama 3 and Qwen2 cut text, as their tokenizer.json spells it; they differ in how many digits go
// together.
constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// nullptr when the value is no object, has no such member, or has null there.
const ordered_json* member(const ordered_json& value, const char* name) {
  if (!value.is_object()) {
    return nullptr;
  }
  const auto found = value.find(name);
  return found == value.end() || found->is_null() ? nullptr : &*found;
}

std::string text_or(const ordered_json& value, const char* name, const std::string& fallback = {}) {
  const ordered_json* found = member(value, name);
  return found != nullptr && found->is_string() ? found->get<std::string>() : fallback;
}

bool flag(const ordered_json& value, const char* name, bool fallback) {
  const ordered_json* found = member(value, name);
  return found != nullptr && found->is_boolean() ? found->get<bool>() : fallback;
}

// A processor or pre-tokenizer and what it is made of, one behind the other.
std::vector<const ordered_json*> parts_of(const ordered_json& tokenizer, const char* name,
                                          const char* list_name) {
  const ordered_json* whole = member(tokenizer, name);
  if (whole == nullptr) {
    return {};
  }
  const ordered_json* list = member(*whole, list_name);
  if (text_or(*whole, "type") != "Sequence" || list == nullptr || !list->is_array()) {
    return {whole};
  }
  std::vector<const ordered_json*> parts;
  for (const ordered_json& part : *list) {
    parts.push_back(&part);
  }
  return parts;
}

// llama.cpp's name for the way that a tokenizer cuts text, if it is one of the ways known here.
std::optional<std::string> known_pre(const ordered_json& tokenizer) {
  const std::vector<const ordered_json*> parts = parts_of(tokenizer, "pre_tokenizer", "pretokenizers");
  const ordered_json* model = member(tokenizer, "model");
  if (parts.empty() || parts.size() > 2 || model == nullptr ||
      text_or(*parts.back(), "type") != "ByteLevel" || flag(*parts.back(), "add_prefix_space", true)) {
    return std::nullopt;
  }
  const bool gpt2_cuts = flag(*parts.back(), "use_regex", true);
  const bool whole_words = flag(*model, "ignore_merges", false);
  if (gpt2_cuts) {
    if (whole_words) {
      return std::nullopt;
    }
    if (parts.size() == 1) {
      return "gpt-2";
    }
    const bool digits =
        text_or(*parts.front(), "type") == "Digits" && flag(*parts.front(), "individual_digits", false);
    return digits ? std::optional<std::string>("smollm") : std::nullopt;
  }
  const ordered_json* pattern = member(*parts.front(), "pattern");
  if (parts.size() == 1 || pattern == nullptr || text_or(*parts.front(), "type") != "Split" ||
      text_or(*parts.front(), "behavior") != "Isolated" || flag(*parts.front(), "invert", false)) {
    return std::nullopt;
  }
  const std::string regex = text_or(*pattern, "Regex");
  if (regex == kLlama3Pattern) {
    return whole_words ? "llama-bpe" : "smaug-bpe";
  }
  return regex == kQwen2Pattern && !whole_words ? std::optional<std::string>("qwen2") : std::nullopt;
}

// Some tokenizers do not mark as special what is; llama.cpp's converter goes by these looks.
bool looks_special(std::string_view text) {
  const auto between = [text](std::string_view first, std::string_view last) {
    return text.starts_with(first) && text.ends_with(last);
  };
  return text == "<pad>" || text == "<mask>" || text == "<2mass>" || text == "[@BOS@]" ||
         between("<|", "|>") || between("<｜", "｜>") || between("<unused", ">");
}

std::string with_replaced(std::string text, std::string_view from, std::string_view to) {
  for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

std::string in_quotes(std::string_view text) {
  return "\"" + std::string(text.substr(0, 100)) + "\"";
}

class Tokenizer {
 public:
  Tokenizer(const std::filesystem::path& folder, const ordered_json& config, std::int64_t vocab_size)
      : file_(folder / "tokenizer.json"), config_(config), vocab_size_(static_cast<std::size_t>(vocab_size)) {
    if (!std::filesystem::exists(file_)) {
      fail_input({.file = folder, .problem = "there is no tokenizer.json", .next_step = kWayOut});
    }
    tokenizer_ = read_json_object(file_, kLargestTokenizer);
    if (const std::filesystem::path beside = folder / "tokenizer_config.json";
        std::filesystem::exists(beside)) {
      settings_ = read_json_object(beside, kLargestTokenizer);
    }
    chat_template_ = find_chat_template(folder);
    require_byte_level_bpe();
  }

  GgufMetadata metadata(std::string pre) {
    if (pre.empty()) {
      const std::optional<std::string> known = known_pre(tokenizer_);
      if (!known) {
        fail_input({.file = file_,
                    .problem = "how it cuts text before merging",
                    .expected = "the way of GPT-2, SmolLM2, Llama 3 or Qwen2",
                    .found = "another one",
                    .next_step = kWayOut});
      }
      pre = *known;
    }
    tokens_.resize(vocab_size_);
    types_.assign(vocab_size_, kUnused);
    read_vocabulary();
    read_added_tokens();
    name_unused();
    GgufMetadata out = {{"tokenizer.ggml.model", std::string("gpt2")},
                        {"tokenizer.ggml.pre", std::move(pre)},
                        {"tokenizer.ggml.tokens", std::move(tokens_)},
                        {"tokenizer.ggml.token_type", std::move(types_)},
                        {"tokenizer.ggml.merges", merges()}};
    const std::optional<std::uint32_t> first = added_by_template(true);
    const std::optional<std::uint32_t> last = added_by_template(false);
    std::optional<std::uint32_t> bos = special("bos");
    bos = bos ? bos : first;
    std::optional<std::uint32_t> eos = special("eos");
    eos = eos ? eos : last;
    const auto add_id = [&out](const char* key, std::optional<std::uint32_t> id) {
      if (id) {
        out.emplace_back(key, *id);
      }
    };
    add_id("tokenizer.ggml.bos_token_id", bos);
    add_id("tokenizer.ggml.eos_token_id", eos);
    add_id("tokenizer.ggml.unknown_token_id", special("unk"));
    add_id("tokenizer.ggml.padding_token_id", special("pad"));
    // Without an id llama.cpp would add token 11.
    out.emplace_back("tokenizer.ggml.add_bos_token", bos && flag(settings_, "add_bos_token", bos == first));
    out.emplace_back("tokenizer.ggml.add_eos_token", eos && flag(settings_, "add_eos_token", eos == last));
    if (!chat_template_.empty()) {
      out.emplace_back("tokenizer.chat_template", std::move(chat_template_));
    }
    return out;
  }

 private:
  [[noreturn]] void complain(const std::string& problem, const std::string& expected = {},
                             const std::string& found = {}) const {
    fail_input({.file = file_, .problem = problem, .expected = expected, .found = found});
  }

  const ordered_json& model() const {
    static const ordered_json kNone = ordered_json::object();
    const ordered_json* found = member(tokenizer_, "model");
    return found == nullptr ? kNone : *found;
  }

  void require_byte_level_bpe() const {
    const auto refuse = [this](const std::string& found) {
      fail_input({.file = file_,
                  .problem = "the model of the tokenizer",
                  .expected = "byte-level BPE",
                  .found = found,
                  .next_step = kWayOut});
    };
    // Files of old leave the type out.
    const std::string type = text_or(model(), "type", member(model(), "merges") != nullptr ? "BPE" : "none");
    if (type != "BPE") {
      refuse(type);
    }
    const std::vector<const ordered_json*> parts = parts_of(tokenizer_, "pre_tokenizer", "pretokenizers");
    const bool byte_level = std::any_of(parts.begin(), parts.end(), [](const ordered_json* part) {
      return text_or(*part, "type") == "ByteLevel";
    });
    if (!byte_level) {
      refuse(flag(model(), "byte_fallback", false) ? "BPE over characters with byte_fallback"
                                                   : "BPE over characters");
    }
    for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!text_or(model(), name).empty()) {
        refuse(std::string("BPE with a ") + name);
      }
    }
  }

  std::string find_chat_template(const std::filesystem::path& folder) const {
    if (const std::filesystem::path beside = folder / "chat_template.jinja";
        std::filesystem::exists(beside)) {
      return read_text(beside, kLargestTemplate);
    }
    const ordered_json* found = member(settings_, "chat_template");
    if (found == nullptr || !found->is_array()) {
      return text_or(settings_, "chat_template");
    }
    for (const ordered_json& one : *found) {
      if (text_or(one, "name") == "default") {
        return text_or(one, "template");
      }
    }
    return {};
  }

  // The place of a token's id, checked.
  std::size_t place_of(const std::string& text, const ordered_json& id) const {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= vocab_size_) {
      complain("the id of token " + in_quotes(text), "one below " + std::to_string(vocab_size_), id.dump());
    }
    return id.get<std::size_t>();
  }

  void read_vocabulary() {
    const ordered_json* vocabulary = member(model(), "vocab");
    if (vocabulary == nullptr || !vocabulary->is_object()) {
      complain("the vocabulary", "an object of tokens and ids",
               vocabulary == nullptr ? "nothing" : vocabulary->type_name());
    }
    for (const auto& [text, id] : vocabulary->items()) {
      const std::size_t place = place_of(text, id);
      if (types_[place] != kUnused) {
        complain("token id " + std::to_string(place) + " is given to " + in_quotes(tokens_[place]) + " and " +
                 in_quotes(text));
      }
      tokens_[place] = text;
      types_[place] = kNormal;
      ids_.emplace(text, place);
    }
  }

  void read_added_tokens() {
    const ordered_json* added = member(tokenizer_, "added_tokens");
    if (added == nullptr) {
      return;
    }
    if (!added->is_array()) {
      complain("added_tokens", "an array", added->type_name());
    }
    for (const ordered_json& token : *added) {
      const ordered_json* id = member(token, "id");
      const ordered_json* content = member(token, "content");
      if (id == nullptr || content == nullptr || !content->is_string()) {
        complain("an added token", "an id and a content", token.dump());
      }
      const auto text = content->get<std::string>();
      const std::size_t place = place_of(text, *id);
      const auto known = ids_.find(text);
      if (known != ids_.end() && known->second != place) {
        complain("the id of the added token " + in_quotes(text),
                 std::to_string(known->second) + " as in the vocabulary", std::to_string(place));
      }
      if (types_[place] != kUnused && known == ids_.end()) {
        complain("token id " + std::to_string(place) + " is given to " + in_quotes(tokens_[place]) + " and " +
                 in_quotes(text));
      }
      const bool control = flag(token, "special", false) || looks_special(text);
      types_[place] = control ? kControl : kUserDefined;
      // llama.cpp looks for these in text as it comes.
      tokens_[place] = control ? text : with_replaced(text, "\u2581", " ");
      ids_.emplace(text, place);
    }
  }

  void name_unused() {
    std::unordered_set<std::string_view> texts;
    for (std::size_t i = 0; i < vocab_size_; ++i) {
      if (types_[i] == kUnused) {
        tokens_[i] = "[PAD" + std::to_string(i) + "]";
      }
      // llama.cpp gives up on these.
      if (!texts.insert(tokens_[i]).second) {
        complain("the text " + in_quotes(tokens_[i]) + " stands for two tokens");
      }
    }
  }

  std::vector<std::string> merges() const {
    const ordered_json* list = member(model(), "merges");
    if (list == nullptr || !list->is_array()) {
      complain("merges", "an array", list == nullptr ? "nothing" : list->type_name());
    }
    std::vector<std::string> out;
    out.reserve(list->size());
    for (const ordered_json& merge : *list) {
      std::string first;
      std::string second;
      if (merge.is_string()) {
        const auto& both = merge.get_ref<const std::string&>();
        const std::size_t space = both.find(' ');
        if (space != std::string::npos && both.find(' ', space + 1) == std::string::npos) {
          first = both.substr(0, space);
          second = both.substr(space + 1);
        }
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        first = merge[0].get<std::string>();
        second = merge[1].get<std::string>();
      }
      if (first.empty() || second.empty()) {
        complain("merge " + std::to_string(out.size()), R"("a b" or ["a", "b"])", merge.dump());
      }
      for (const std::string& text : {first, second, first + second}) {
        if (!ids_.contains(text)) {
          complain("merge " + std::to_string(out.size()), "tokens of the vocabulary", in_quotes(text));
        }
      }
      // A space stands between the two, so that one inside of them is spelled as bytes are.
      out.push_back(with_replaced(first, " ", "\u0120") + " " + with_replaced(second, " ", "\u0120"));
    }
    return out;
  }

  std::optional<std::uint32_t> id_of(const std::string& text) const {
    const auto found = ids_.find(text);
    return found == ids_.end() ? std::nullopt : std::optional(static_cast<std::uint32_t>(found->second));
  }

  // The id of bos, eos, unk or pad.
  std::optional<std::uint32_t> special(const std::string& name) const {
    const std::string token_key = name + "_token";
    const std::string id_key = token_key + "_id";
    if (const ordered_json* token = member(settings_, token_key.c_str())) {
      const std::string text = token->is_string() ? token->get<std::string>() : text_or(*token, "content");
      if (const std::optional<std::uint32_t> id = id_of(text)) {
        return id;
      }
    }
    const ordered_json* text_config = member(config_, "text_config");
    const ordered_json* id = member(config_, id_key.c_str());
    if (id == nullptr && text_config != nullptr) {
      id = member(*text_config, id_key.c_str());
    }
    if (id != nullptr && id->is_array() && !id->empty()) {
      id = &id->front();
    }
    if (id == nullptr || !id->is_number_unsigned() || id->get<std::uint64_t>() >= vocab_size_) {
      return std::nullopt;
    }
    return id->get<std::uint32_t>();
  }

  // The token that the tokenizer itself puts before or behind a text.
  std::optional<std::uint32_t> added_by_template(bool before) const {
    for (const ordered_json* part : parts_of(tokenizer_, "post_processor", "processors")) {
      const ordered_json* single = member(*part, "single");
      if (text_or(*part, "type") != "TemplateProcessing" || single == nullptr || !single->is_array() ||
          single->size() < 2) {
        continue;
      }
      if (const ordered_json* token = member(before ? single->front() : single->back(), "SpecialToken")) {
        return id_of(text_or(*token, "id"));
      }
    }
    return std::nullopt;
  }

  std::filesystem::path file_;
  const ordered_json& config_;
  std::size_t vocab_size_;
  ordered_json tokenizer_;
  ordered_json settings_;
  std::string chat_template_;
  std::vector<std::string> tokens_;
  std::vector<std::int32_t> types_;
  std::unordered_map<std::string, std::size_t> ids_;
};

}  // namespace

GgufMetadata gguf_tokenizer(const std::filesystem::path& folder, const ordered_json& config,
                            const std::string& pre, std::int64_t vocab_size) {
  if (vocab_size <= 0 || vocab_size > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("no tokenizer has " + std::to_string(vocab_size) + " tokens");
  }
  return Tokenizer(folder, config, vocab_size).metadata(pre);
}

GgufMetadata gguf_no_vocab() {
  return {{"tokenizer.ggml.model", std::string("no_vocab")}};
}

}  // namespace relatent
