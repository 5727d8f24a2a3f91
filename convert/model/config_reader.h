// Keys of a config.json, with complaints that name the file, the key, what was expected and found.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "linalg/matrix.h"

namespace relatent {

// Both arguments must outlive it. A key with null counts as absent. Everything throws Error (input).
class ConfigReader {
 public:
  using Json = nlohmann::ordered_json;

  ConfigReader(const Json& config, const std::filesystem::path& path) : config_(config), path_(path) {}

  const Json& json() const { return config_; }
  const std::filesystem::path& path() const { return path_; }
  // nullptr when absent.
  const Json* find(const char* key) const;
  bool has(const char* key) const { return find(key) != nullptr; }
  // A positive whole number of at most 2^20, beyond any real model and small enough that products of three
  // fit 64 bits.
  Index size(const char* key) const;
  Index size_or(const char* key, Index fallback) const { return has(key) ? size(key) : fallback; }
  // Likewise, or zero.
  Index count(const char* key) const;
  double number(const char* key) const;
  bool flag_or(const char* key, bool fallback) const;
  std::string text(const char* key) const;
  [[noreturn]] void complain(const char* key, const std::string& expected) const;

  static constexpr std::int64_t max_size = 1 << 20;

 private:
  const Json& config_;
  const std::filesystem::path& path_;
};

}  // namespace relatent
