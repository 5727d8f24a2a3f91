// conversion_report.json, which convert leaves beside the weights: what it wrote, and what it measured of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "convert/verify/verify.h"
#include "formats/checkpoint.h"
#include "formats/npy.h"

namespace relatent {

// What was measured of the written checkpoint against its source on a few tokens, which verify runs again.
struct Probe {
  std::vector<std::int32_t> tokens;  // of one sequence
  double nats = 0;
  double mean_kl = 0;
  double rel_logit_error = 0;
  std::vector<LayerFidelity> layers;
};

// Tokens of a probe at most.
inline constexpr Index probe_tokens = 128;

struct ConversionReport {
  std::string version;  // of the program: "relatent 0.4.0"
  std::string method;
  std::string form;
  std::string engine;
  std::string dtype;                           // of the converted tensors, as safetensors calls it
  std::string source_config;                   // XXH3-128 of the source's config.json, as all checksums here
  std::map<std::string, std::string> files;    // checksum of every file but weights and the report
  std::map<std::string, std::string> tensors;  // checksum of every tensor that was computed or cast
  std::optional<Probe> probe;                  // nothing was measured without calibration tokens

  // JSON that ends with a line break; the same for the same report.
  std::string text() const;
  // Throws Error (input) naming the file and the key when it is no report of a known version.
  static ConversionReport read(const std::filesystem::path& path);
};

// The first tokens of the first sequence.
Sequences probe_of(const Sequences& sequences);
// The sequence that was measured.
Sequences sequence_of(const Probe& probe);
// Whether a model of that config can run it: ids below the vocabulary, as many layers.
bool fits(const Probe& probe, const ModelConfig& config);
Probe probe_from(const Sequences& sequences, const Verification& measured);

// Checksums of the folder's regular files but weights, report and those left out, by name. Throws Error
// (input, machine) as reading them does.
std::map<std::string, std::string> file_checksums(const std::filesystem::path& folder,
                                                  const std::set<std::string>& left_out = {});

}  // namespace relatent
