#include "formats/json_text.h"

#include <nlohmann/json.hpp>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/files.h"

namespace relatent {
namespace {

using nlohmann::ordered_json;

// Builds the tree itself: ordered_json looks for a name by walking all members, which on insertion would make
// a large object quadratic, and it keeps silent about duplicates.
class TreeBuilder {
 public:
  TreeBuilder(const std::filesystem::path& file, ordered_json& root) : file_(file), root_(root) {}

  bool null() { return add(nullptr); }
  bool boolean(bool value) { return add(value); }
  bool number_integer(ordered_json::number_integer_t value) { return add(value); }
  bool number_unsigned(ordered_json::number_unsigned_t value) { return add(value); }
  bool number_float(ordered_json::number_float_t value, const std::string& /*text*/) { return add(value); }
  bool string(std::string& value) { return add(std::move(value)); }
  bool binary(ordered_json::binary_t& value) { return add(std::move(value)); }

  bool start_object(std::size_t /*members*/) { return open(ordered_json::object()); }
  bool start_array(std::size_t /*elements*/) { return open(ordered_json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }

  bool key(std::string& name) {
    if (!levels_.back().names.insert(name).second) {
      fail_input({.file = file_,
                  .problem = "the name \"" + name.substr(0, 200) + "\" appears twice in one JSON object"});
    }
    name_ = std::move(name);
    return true;
  }

  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) {
    fail_input({.file = file_,
                .problem = "not valid JSON",
                .found = "an error at byte " + std::to_string(position)});
  }

 private:
  struct Level {
    ordered_json* value;
    std::unordered_set<std::string> names;
  };

  ordered_json* place(ordered_json value) {
    if (levels_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    ordered_json& parent = *levels_.back().value;
    if (parent.is_array()) {
      auto& elements = parent.get_ref<ordered_json::array_t&>();
      elements.push_back(std::move(value));
      return &elements.back();
    }
    auto& members = parent.get_ref<ordered_json::object_t&>();
    members.emplace_back(std::move(name_), std::move(value));
    return &members.back().second;
  }

  bool add(ordered_json value) {
    place(std::move(value));
    return true;
  }

  bool open(ordered_json value) {
    if (levels_.size() == kDeepestJson) {
      fail_input({.file = file_,
                  .problem = "JSON is nested too deeply",
                  .expected = "at most " + std::to_string(kDeepestJson) + " levels",
                  .found = "more"});
    }
    // A level's address stays good: its parent does not grow until the level is closed.
    levels_.push_back({place(std::move(value)), {}});
    return true;
  }

  bool close() {
    levels_.pop_back();
    return true;
  }

  const std::filesystem::path& file_;
  ordered_json& root_;
  std::vector<Level> levels_;
  std::string name_;
};

}  // namespace

bool is_utf8(std::string_view text) {
  try {
    static_cast<void>(ordered_json(text).dump());
    return true;
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

ordered_json parse_json(const std::filesystem::path& file, std::string_view text) {
  // The parser takes a NUL for the end of the text, whatever follows it.
  if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos) {
    fail_input(
        {.file = file, .problem = "not valid JSON", .found = "a NUL at byte " + std::to_string(nul + 1)});
  }
  ordered_json root;
  TreeBuilder builder(file, root);
  ordered_json::sax_parse(text, &builder);
  return root;
}

ordered_json read_json_object(const std::filesystem::path& file, std::size_t max_bytes) {
  ordered_json root = parse_json(file, read_text(file, max_bytes));
  if (!root.is_object()) {
    fail_input(
        {.file = file, .expected = "a JSON object", .found = std::string("a JSON ") + root.type_name()});
  }
  return root;
}

}  // namespace relatent
