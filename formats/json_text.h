// JSON from files nobody vouches for.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

namespace relatent {

// Nesting that no file of a checkpoint comes near; deeper text is refused.
inline constexpr std::size_t kDeepestJson = 64;

// Whether JSON can hold the text.
bool is_utf8(std::string_view text);

// Parses JSON text, keeping the order of members. Throws Error (input) naming the file: not valid UTF-8 JSON,
// anything but white space after the value, a member name twice in one object, nesting beyond kDeepestJson.
nlohmann::ordered_json parse_json(const std::filesystem::path& file, std::string_view text);

// The same for a whole file of at most max_bytes, which must hold an object.
nlohmann::ordered_json read_json_object(const std::filesystem::path& file, std::size_t max_bytes);

}  // namespace relatent
