#include "convert/model/config_reader.h"

#include <cmath>
#include <sstream>

#include "convert/model/config_ranges.h"
#include "formats/error.h"

namespace relatent {
namespace {

bool is_size(const ConfigReader::Json& value, Index least, Index most) {
  // Compared unsigned, as what is beyond int64 is stored.
  return value.is_number_integer() && (value.is_number_unsigned() || value.get<std::int64_t>() >= 0) &&
         value.get<std::uint64_t>() >= static_cast<std::uint64_t>(least) &&
         value.get<std::uint64_t>() <= static_cast<std::uint64_t>(most);
}

std::string range_words(const NumberRange& range) {
  if (range == any_finite) {
    return "a finite number";
  }
  std::ostringstream out;
  out.precision(10);
  out << "a number from " << range.least << " to " << range.most;
  return out.str();
}

// What complaints say was found. Not every format is JSON, which has no NaN.
std::string found_words(const ConfigReader::Json& value) {
  const bool finite = !value.is_number_float() || std::isfinite(value.get<double>());
  return finite ? value.dump() : std::to_string(value.get<double>());
}

const char* out_of_range_step(const ConfigReader::Json* value) {
  return value != nullptr && value->is_number() ? "compare with what the authors of the model published" : "";
}

}  // namespace

const ConfigReader::Json* ConfigReader::find(const char* key) const {
  const auto it = config_.find(key);
  return it == config_.end() || it->is_null() ? nullptr : &*it;
}

Index ConfigReader::size(const char* key) const {
  const Json* value = find(key);
  const Index most = largest_size(key);
  if (value == nullptr || !is_size(*value, 1, most)) {
    complain(key, "a positive whole number of at most " + std::to_string(most), out_of_range_step(value));
  }
  return value->get<Index>();
}

Index ConfigReader::count(const char* key) const {
  const Json* value = find(key);
  const Index most = largest_size(key);
  if (value == nullptr || !is_size(*value, 0, most)) {
    complain(key, "zero or a positive whole number of at most " + std::to_string(most),
             out_of_range_step(value));
  }
  return value->get<Index>();
}

double ConfigReader::number(const char* key) const {
  const Json* value = find(key);
  const NumberRange range = number_range(key);
  if (value == nullptr || !value->is_number() || !range.holds(value->get<double>())) {
    complain(key, range_words(range), out_of_range_step(value));
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

void ConfigReader::complain(const char* key, const std::string& expected,
                            const std::string& next_step) const {
  const auto it = config_.find(key);
  fail_input({path_, "", inside_ + std::string(key), expected,
              it == config_.end() ? "nothing" : found_words(*it), next_step});
}

}  // namespace relatent
