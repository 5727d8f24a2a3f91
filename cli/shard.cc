#include "convert/shard/shard.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "cli/commands.h"
#include "cli/progress.h"
#include "convert/shard/manifest.h"
#include "formats/error.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string model;
  std::string shards;
  std::string output;
  std::optional<Index> tp;
  std::optional<std::string> layout;
  bool json = false;
  bool quiet = false;
};

Json to_json(const ShardReport& report) {
  Json out = {{"run", report.run},
              {"tp", report.tp},
              {"seconds", report.seconds},
              {"peak_rss_bytes", peak_rss_bytes()}};
  out["files"] = Json::array();
  for (const WrittenFile& file : report.files) {
    out["files"].push_back({{"file", file.name}, {"bytes", file.bytes}});
  }
  return out;
}

ShardReport cut(const Options& options) {
  if (!options.tp) {
    fail_usage("--tp is missing: how many ranks there are to be");
  }
  ShardOptions shard;
  shard.source = options.model;
  shard.output = options.output;
  shard.tp = *options.tp;
  shard.layout = options.layout.value_or(shard.layout);
  Progress progress("shard", options.quiet, "tensor");
  return write_shards(shard, std::ref(progress));
}

ShardReport merge(const Options& options) {
  if (options.tp || options.layout) {
    fail_usage(std::string(options.tp ? "--tp" : "--layout") +
               " does not go with --merge, which finds it in " + kShardsName);
  }
  Progress progress("merge", options.quiet, "tensor");
  return merge_shards(options.shards, options.output, std::ref(progress));
}

int run(const Options& options) {
  if (options.model.empty() == options.shards.empty()) {
    fail_usage("give either a checkpoint folder to cut or --merge with a folder of shards");
  }
  const bool cuts = options.shards.empty();
  const ShardReport report = cuts ? cut(options) : merge(options);
  if (options.json) {
    std::puts(to_json(report).dump().c_str());
  }
  if (!options.quiet) {
    std::uint64_t bytes = 0;
    std::uint64_t most = 0;
    for (const WrittenFile& file : report.files) {
      bytes += file.bytes;
      most = std::max(most, file.bytes);
    }
    std::fprintf(stderr, "%s %td rank%s, %s of weights, %s in the largest file, %.1f s, run %s: %s\n",
                 cuts ? "cut for" : "merged", report.tp, report.tp == 1 ? "" : "s", bytes_text(bytes).c_str(),
                 bytes_text(most).c_str(), report.seconds, report.run.c_str(), options.output.c_str());
  }
  return 0;
}

}  // namespace

void add_shard(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("shard", "Cut a checkpoint into one file per tensor-parallel rank, or merge them");
  command->add_option("model", options->model, "Checkpoint folder to cut, converted or not");
  command->add_option("--merge", options->shards,
                      "Folder of shards to put together again, every file byte for byte");
  command->add_option("-o,--output", options->output, "Folder to make; must not exist")->required();
  command->add_option("--tp", options->tp, "Number of ranks")->check(CLI::Range(Index{1}, kMostRanks));
  command->add_option("--layout", options->layout,
                      "plain (default): the checkpoint's names, each tensor a contiguous part");
  command->add_flag("--json", options->json, "One JSON object on stdout");
  command->add_flag("--quiet", options->quiet, "No progress");
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace relatent
