// Keys of a config.json, with complaints that name the file, the key, what was expected and found.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "linalg/matrix.h"

namespace relatent {

// All arguments must outlive it. A key with null counts as absent. Everything throws Error (input).
class ConfigReader {
 public:
  using Json = nlohmann::ordered_json;

  // `inside` precedes the key in complaints about an object inside config.json, e.g. "rope parameter ".
  ConfigReader(const Json& config, const std::filesystem::path& path, const char* inside = "")
      : config_(config), path_(path), inside_(inside) {}

  const Json& json() const { return config_; }
  const std::filesystem::path& path() const { return path_; }
  // nullptr when absent.
  const Json* find(const char* key) const;
  bool has(const char* key) const { return find(key) != nullptr; }
  // A positive whole number in the range of its key (config_ranges.h).
  Index size(const char* key) const;
  Index size_or(const char* key, Index fallback) const { return has(key) ? size(key) : fallback; }
  // Likewise, or zero.
  Index count(const char* key) const;
  // A finite number in the range of its key.
  double number(const char* key) const;
  double number_or(const char* key, double fallback) const { return has(key) ? number(key) : fallback; }
  bool flag_or(const char* key, bool fallback) const;
  std::string text(const char* key) const;
  [[noreturn]] void complain(const char* key, const std::string& expected,
                             const std::string& next_step = "") const;

 private:
  const Json& config_;
  const std::filesystem::path& path_;
  const char* inside_;
};

}  // namespace relatent
