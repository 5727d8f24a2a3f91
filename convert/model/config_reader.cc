#include "convert/model/config_reader.h"

#include <cmath>

#include "formats/error.h"

namespace relatent {

const ConfigReader::Json* ConfigReader::find(const char* key) const {
  const auto it = config_.find(key);
  return it == config_.end() || it->is_null() ? nullptr : &*it;
}

Index ConfigReader::size(const char* key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_number_integer() || value->get<std::int64_t>() <= 0 ||
      value->get<std::int64_t>() > max_size) {
    complain(key, "a positive whole number");
  }
  return value->get<Index>();
}

Index ConfigReader::count(const char* key) const {
  const Json* value = find(key);
  return value != nullptr && value->is_number_integer() && value->get<std::int64_t>() == 0 ? 0 : size(key);
}

double ConfigReader::number(const char* key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_number() || !std::isfinite(value->get<double>())) {
    complain(key, "a number");
  }
  return value->get<double>();
}

bool ConfigReader::flag_or(const char* key, bool fallback) const {
  const Json* value = find(key);
  if (value == nullptr) {
    return fallback;
  }
  if (!value->is_boolean()) {
    complain(key, "true or false");
  }
  return value->get<bool>();
}

std::string ConfigReader::text(const char* key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_string()) {
    complain(key, "a string");
  }
  return value->get<std::string>();
}

void ConfigReader::complain(const char* key, const std::string& expected) const {
  const auto it = config_.find(key);
  fail_input({path_, "", key, expected, it == config_.end() ? "nothing" : it->dump(), ""});
}

}  // namespace relatent
