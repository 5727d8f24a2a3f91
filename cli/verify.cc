#include "convert/verify/verify.h"

#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "cli/commands.h"
#include "cli/progress.h"
#include "formats/npy.h"

namespace relatent {
namespace {

struct Options {
  std::string source;
  std::string converted;
  std::string tokens;
  std::int64_t sequences = 0;
  std::int64_t length = 1024;
  std::optional<Index> tp;
  std::optional<double> max_kl;
  std::optional<double> max_nats;
  bool json = false;
  bool quiet = false;
};

void row(const char* what, const std::string& source, const std::string& converted, FILE* out) {
  std::fprintf(out, "  %-34s %14s %14s\n", what, source.c_str(), converted.c_str());
}

void print_table(const Options& options, const Verification& v, FILE* out) {
  std::fprintf(out, "%s  against  %s\n", options.converted.c_str(), options.source.c_str());
  std::fprintf(out, "%lld predicted tokens of %s\n\n", static_cast<long long>(v.logits.tokens),
               options.tokens.c_str());
  row("", "source", "converted", out);
  row("perplexity", number_text("%.4f", v.source_ppl), number_text("%.4f", v.converted_ppl), out);
  row("nats lost", "", number_text("%.6f", v.nats), out);
  row("mean KL(source, converted)", "", number_text("%.3e", v.logits.mean_kl), out);
  row("largest KL", "", number_text("%.3e", v.logits.max_kl), out);
  row("same most likely token", "", number_text("%.3f %%", 100 * v.logits.top1_agreement), out);
  row("largest logit difference", "", number_text("%.3e", v.logits.max_abs_logit_diff), out);
  row("relative logit error", "", number_text("%.3e", v.logits.rel_logit_error), out);
  row("cache bytes per token", std::to_string(v.source_cache_bytes), std::to_string(v.converted_cache_bytes),
      out);
  for (std::size_t i = 1; i < reported_tp.size(); ++i) {
    const std::string what = "  per device at TP " + std::to_string(reported_tp[i]);
    const auto text = [](const std::optional<Index>& bytes) {
      return bytes ? std::to_string(*bytes) : std::string("-");
    };
    row(what.c_str(), text(v.source_per_device[i]), text(v.converted_per_device[i]), out);
  }
  std::fprintf(out, "\n  %-10s %22s %22s\n", "layer", "attention rel. error", "residual rel. error");
  for (std::size_t i = 0; i < v.layers.size(); ++i) {
    std::fprintf(out, "  %-10zu %22.3e %22.3e\n", i, v.layers[i].attention_rel_error,
                 v.layers[i].residual_rel_error);
  }
}

void print_devices(const DeviceVerification& v, FILE* out) {
  std::fprintf(out, "\nrun by %td devices, each with its share, against one: relative logit error %.3e\n",
               v.tp, v.logits.rel_logit_error);
  std::fputs("cache bytes per token of each:", out);
  for (const Index bytes : v.cache_bytes_per_token) {
    std::fprintf(out, " %td", bytes);
  }
  std::fputs("\n", out);
}

int run(const Options& options) {
  const Model source = Model::open(options.source);
  const Model converted = Model::open(options.converted);
  const Sequences sequences =
      read_sequences(options.tokens, options.length, options.sequences, source.config().vocab_size);
  std::optional<DeviceVerification> devices;
  if (options.tp) {
    Progress progress("verify devices", options.quiet);
    devices = verify_devices(converted, sequences, *options.tp, std::ref(progress));
  }
  Verification v;
  {
    Progress progress("verify", options.quiet);
    v = verify(source, converted, sequences, std::ref(progress));
  }
  if (options.json) {
    nlohmann::ordered_json out = to_json(v);
    if (devices) {
      out["devices"] = to_json(*devices);
    }
    add_cost(out);
    std::puts(out.dump().c_str());
  }
  if (!options.json || !options.quiet) {
    print_table(options, v, options.json ? stderr : stdout);
  }
  if (devices && (!options.json || !options.quiet)) {
    print_devices(*devices, options.json ? stderr : stdout);
  }
  int code = 0;
  const std::int64_t broken = v.logits.non_finite + (devices ? devices->logits.non_finite : 0);
  if (broken > 0) {
    std::fprintf(stderr,
                 "relatent: BROKEN: logits are NaN or infinite at %lld positions, so nothing can be compared "
                 "there\n",
                 static_cast<long long>(broken));
    code = 1;
  }
  if (options.max_kl && !(v.logits.mean_kl <= *options.max_kl)) {
    std::fprintf(stderr, "relatent: mean KL %.6g is above the limit %.6g\n", v.logits.mean_kl,
                 *options.max_kl);
    code = 1;
  }
  if (options.max_nats && !(v.nats <= *options.max_nats)) {
    std::fprintf(stderr, "relatent: %.6g nats lost is above the limit %.6g\n", v.nats, *options.max_nats);
    code = 1;
  }
  return code;
}

}  // namespace

void add_verify(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("verify", "Run source and converted side by side, from their files");
  command->add_option("source", options->source, "Source checkpoint folder")->required();
  command->add_option("converted", options->converted, "Converted checkpoint folder")->required();
  command
      ->add_option("--tokens", options->tokens, "Token ids: one-dimensional .npy of uint16, int32 or int64")
      ->required();
  command->add_option("--sequences", options->sequences, "Number of sequences (default: all that fit)")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--length", options->length, "Tokens per sequence")->capture_default_str();
  command
      ->add_option(
          "--tp", options->tp,
          "Also run the converted model as so many tensor-parallel devices would, each with its share of "
          "weights and cache, and compare")
      ->check(CLI::Range(1, 1024));
  command->add_option("--max-kl", options->max_kl, "Exit 1 when the mean KL is above this");
  command->add_option("--max-nats", options->max_nats, "Exit 1 when more nats are lost than this");
  command->add_flag("--json", options->json, "One JSON object on stdout, the table on stderr");
  command->add_flag("--quiet", options->quiet, "No progress");
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace relatent
