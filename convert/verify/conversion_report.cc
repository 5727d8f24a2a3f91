#include "convert/verify/conversion_report.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>
#include <utility>

#include "convert/model/config_reader.h"
#include "formats/error.h"
#include "formats/files.h"
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
  return {{"tokens", probe.tokens},
          {"nats", probe.nats},
          {"mean_kl", probe.mean_kl},
          {"rel_logit_error", probe.rel_logit_error},
          {"layers", to_json(probe.layers)}};
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

// What is not finite has no number in JSON, and is null.
double number_or_nan(const ConfigReader& in, const char* key) {
  const bool is_null = in.json().contains(key) && !in.has(key);
  return is_null ? std::numeric_limits<double>::quiet_NaN() : in.number(key);
}

const Json& list(const ConfigReader& in, const char* key) {
  const Json* found = in.find(key);
  if (found == nullptr || !found->is_array()) {
    in.complain(key, "a list");
  }
  return *found;
}

std::map<std::string, std::string> checksums(const ConfigReader& in, const char* key) {
  const Json* found = in.find(key);
  if (found == nullptr || !found->is_object() ||
      !std::all_of(found->begin(), found->end(), [](const Json& value) { return value.is_string(); })) {
    in.complain(key, "an object of checksums");
  }
  return found->get<std::map<std::string, std::string>>();
}

Probe read_probe(const std::filesystem::path& path, const Json& json) {
  const ConfigReader in(json, path, "probe: ");
  Probe out;
  for (const Json& id : list(in, "tokens")) {
    if (!id.is_number_unsigned() || !std::in_range<std::int32_t>(id.get<std::uint64_t>())) {
      in.complain("tokens", "a list of token ids");
    }
    out.tokens.push_back(id.get<std::int32_t>());
  }
  if (out.tokens.size() < 2 || out.tokens.size() > static_cast<std::size_t>(probe_tokens)) {
    in.complain("tokens", "2 to " + std::to_string(probe_tokens) + " token ids");
  }
  out.nats = number_or_nan(in, "nats");
  out.mean_kl = number_or_nan(in, "mean_kl");
  out.rel_logit_error = number_or_nan(in, "rel_logit_error");
  for (const Json& entry : list(in, "layers")) {
    const ConfigReader layer(entry, path, "probe: layers: ");
    out.layers.push_back(
        {number_or_nan(layer, "attention_rel_error"), number_or_nan(layer, "residual_rel_error")});
  }
  return out;
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
    const ConfigReader in(json, path);
    if (const Json* found = in.find("format_version"); found == nullptr || *found != format_version) {
      in.complain("format_version", std::to_string(format_version));
    }
    const std::string expected = in.text("checksum");
    json.erase("checksum");
    const std::string found = checksum_of(json);
    if (found != expected) {
      fail_input({path, "", "was changed after it was written", "checksum " + expected, found, ""});
    }
  }
  const ConfigReader in(json, path);
  out.version = in.text("written_by");
  out.method = in.text("method");
  out.form = in.text("form");
  out.engine = in.text("engine");
  out.dtype = in.text("dtype");
  out.source_config = in.text("source_config");
  out.files = checksums(in, "files");
  out.tensors = checksums(in, "tensors");
  if (!json.contains("probe")) {
    in.complain("probe", "null or an object");
  }
  if (const Json* probe = in.find("probe"); probe != nullptr) {
    out.probe = read_probe(path, *probe);
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

std::map<std::string, std::string> file_checksums(const std::filesystem::path& folder,
                                                  const std::set<std::string>& left_out) {
  std::map<std::string, std::string> out;
  for (const std::filesystem::path& entry : entries_of(folder)) {
    const std::string name = entry.filename().string();
    std::error_code unreadable;
    if (!name.ends_with(".safetensors") && name != kReportName && !left_out.contains(name) && is_utf8(name) &&
        std::filesystem::is_regular_file(entry, unreadable)) {
      out.emplace(name, relatent::checksum_of(entry));
    }
  }
  return out;
}

}  // namespace relatent
