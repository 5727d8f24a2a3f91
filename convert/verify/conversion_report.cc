#include "convert/verify/conversion_report.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>
#include <utility>

#include "formats/error.h"
#include "formats/hash.h"
#include "formats/json_text.h"
#include "formats/mapped_file.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::int64_t format_version = 1;
// A tensor takes about a hundred bytes.
constexpr std::size_t largest_report = std::size_t{256} << 20U;

Json to_json(const Probe& probe) {
  Json out = {{"tokens", probe.tokens},
              {"nats", probe.nats},
              {"mean_kl", probe.mean_kl},
              {"rel_logit_error", probe.rel_logit_error},
              {"layers", Json::array()}};
  for (const LayerFidelity& layer : probe.layers) {
    out["layers"].push_back({{"attention_rel_error", layer.attention_rel_error},
                             {"residual_rel_error", layer.residual_rel_error}});
  }
  return out;
}

Json to_json(const ConversionReport& report) {
  return {{"format_version", format_version},
          {"written_by", report.version},
          {"method", report.method},
          {"form", report.form},
          {"engine", report.engine},
          {"dtype", report.dtype},
          {"source_config", report.source_config},
          {"files", report.files},
          {"tensors", report.tensors},
          {"probe", report.probe ? to_json(*report.probe) : Json(nullptr)}};
}

std::string checksum_of(const Json& without_checksum) {
  const std::string text = without_checksum.dump();
  return relatent::checksum_of(std::as_bytes(std::span<const char>(text)));
}

// Members of an object, each of which must be what it should.
class Members {
 public:
  Members(const std::filesystem::path& path, const Json& object) : path_(path), object_(object) {
    if (!object.is_object()) {
      fail_input({path, "", "an entry", "an object", object.type_name(), ""});
    }
  }

  const Json& at(const char* key) const {
    const auto found = object_.find(key);
    if (found == object_.end()) {
      fail_input({path_, "", key, "an entry of that name", "none", ""});
    }
    return *found;
  }

  std::string text(const char* key) const {
    if (!at(key).is_string()) {
      complain(key, "a string");
    }
    return at(key).get<std::string>();
  }

  // What is not finite has no number in JSON, and is null.
  double number(const char* key) const {
    const Json& value = at(key);
    if (value.is_null()) {
      return std::numeric_limits<double>::quiet_NaN();
    }
    if (!value.is_number()) {
      complain(key, "a number or null");
    }
    return value.get<double>();
  }

  std::map<std::string, std::string> texts(const char* key) const {
    std::map<std::string, std::string> out;
    if (!at(key).is_object()) {
      complain(key, "an object of checksums");
    }
    for (const auto& [name, value] : at(key).items()) {
      if (!value.is_string()) {
        complain(key, "an object of checksums");
      }
      out.emplace(name, value.get<std::string>());
    }
    return out;
  }

  const Json& list(const char* key) const {
    if (!at(key).is_array()) {
      complain(key, "a list");
    }
    return at(key);
  }

  [[noreturn]] void complain(const char* key, const std::string& expected) const {
    fail_input({path_, "", key, expected, at(key).dump(), ""});
  }

 private:
  const std::filesystem::path& path_;
  const Json& object_;
};

Probe read_probe(const std::filesystem::path& path, const Json& json) {
  const Members in(path, json);
  Probe out;
  for (const Json& id : in.list("tokens")) {
    if (!id.is_number_unsigned() || !std::in_range<std::int32_t>(id.get<std::uint64_t>())) {
      in.complain("tokens", "a list of token ids");
    }
    out.tokens.push_back(id.get<std::int32_t>());
  }
  if (out.tokens.size() < 2 || out.tokens.size() > static_cast<std::size_t>(probe_tokens)) {
    in.complain("tokens", "2 to " + std::to_string(probe_tokens) + " token ids");
  }
  out.nats = in.number("nats");
  out.mean_kl = in.number("mean_kl");
  out.rel_logit_error = in.number("rel_logit_error");
  for (const Json& entry : in.list("layers")) {
    const Members layer(path, entry);
    out.layers.push_back({layer.number("attention_rel_error"), layer.number("residual_rel_error")});
  }
  return out;
}

bool is_weights(const std::string& name) {
  return name.ends_with(".safetensors");
}

// JSON has no place for other names.
bool is_utf8(const std::string& text) {
  try {
    static_cast<void>(Json(text).dump());
    return true;
  } catch (const Json::exception&) {
    return false;
  }
}

}  // namespace

std::string ConversionReport::text() const {
  Json out = to_json(*this);
  out["checksum"] = checksum_of(out);
  return out.dump(1) + "\n";
}

ConversionReport ConversionReport::read(const std::filesystem::path& path) {
  Json json = read_json_object(path, largest_report);
  ConversionReport out;
  {
    const Members in(path, json);
    if (in.at("format_version") != format_version) {
      in.complain("format_version", std::to_string(format_version));
    }
    const std::string expected = in.text("checksum");
    json.erase("checksum");
    const std::string found = checksum_of(json);
    if (found != expected) {
      fail_input({path, "", "was changed after it was written", "checksum " + expected, found, ""});
    }
  }
  const Members in(path, json);
  out.version = in.text("written_by");
  out.method = in.text("method");
  out.form = in.text("form");
  out.engine = in.text("engine");
  out.dtype = in.text("dtype");
  out.source_config = in.text("source_config");
  out.files = in.texts("files");
  out.tensors = in.texts("tensors");
  if (!in.at("probe").is_null()) {
    out.probe = read_probe(path, in.at("probe"));
  }
  return out;
}

Sequences probe_of(const Sequences& sequences) {
  const std::int64_t length = std::min<std::int64_t>(sequences.length, probe_tokens);
  return {1, length, {sequences.tokens.begin(), sequences.tokens.begin() + length}};
}

Sequences sequence_of(const Probe& probe) {
  return {1, static_cast<std::int64_t>(probe.tokens.size()), probe.tokens};
}

bool fits(const Probe& probe, const ModelConfig& config) {
  return static_cast<Index>(probe.layers.size()) == config.num_hidden_layers &&
         std::all_of(probe.tokens.begin(), probe.tokens.end(),
                     [&](std::int32_t id) { return id < config.vocab_size; });
}

Probe probe_from(const Sequences& sequences, const Verification& measured) {
  return {sequences.tokens, measured.nats, measured.logits.mean_kl, measured.logits.rel_logit_error,
          measured.layers};
}

std::map<std::string, std::string> file_checksums(const std::filesystem::path& folder) {
  std::map<std::string, std::string> out;
  std::error_code error;
  std::filesystem::directory_iterator entry(folder, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    std::error_code unreadable;
    if (!is_weights(name) && name != kReportName && is_utf8(name) && entry->is_regular_file(unreadable)) {
      out.emplace(name, relatent::checksum_of(entry->path()));
    }
  }
  if (error) {
    fail_system(folder, "cannot list the folder", error.value());
  }
  return out;
}

}  // namespace relatent
