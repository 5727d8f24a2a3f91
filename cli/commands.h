// The subcommands: each adds itself to the program and runs when chosen. None of them knows any algebra.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>

#include "formats/resume.h"
#include "linalg/matrix.h"

namespace relatent {

// A subcommand's work: returns the exit code. Set by the callback of the subcommand that was chosen.
using Command = std::function<int()>;

void add_families(CLI::App& app, Command& chosen);
void add_inspect(CLI::App& app, Command& chosen);
void add_calibrate(CLI::App& app, Command& chosen);
void add_convert(CLI::App& app, Command& chosen);
void add_shard(CLI::App& app, Command& chosen);
void add_logits(CLI::App& app, Command& chosen);
void add_verify(CLI::App& app, Command& chosen);

// --context, of Model::open.
void add_context_option(CLI::App& command, std::optional<Index>& context);
// --resume and --save-every.
void add_save_options(CLI::App& command, SaveOptions& save);
// What a run cost, at its end: peak_rss_bytes and stages, longest first (linalg/stages.h).
void add_cost(nlohmann::ordered_json& out);
// What tells people that an unfinished run is continued; nothing when they want quiet.
std::function<void()> say_taken_up(bool quiet);

}  // namespace relatent
