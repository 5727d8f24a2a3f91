#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/progress.h"
#include "convert/verify/evidence.h"
#include "formats/npy.h"

namespace relatent {
namespace {

struct Options {
  std::string source;
  std::optional<Index> context;
  std::string converted;
  std::string tokens;
  std::int64_t sequences = 0;
  std::int64_t length = 1024;
  std::optional<Index> tp;
  Limits limits;
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
  for (std::size_t i = 0; i < reported_contexts.size(); ++i) {
    const std::string what = "  of " + context_text(reported_contexts[i]) + " tokens";
    row(what.c_str(), std::to_string(v.source_context_bytes[i]), std::to_string(v.converted_context_bytes[i]),
        out);
  }
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

void print_findings(const char* what, Outcome outcome, const std::string& passed,
                    const std::vector<std::string>& findings, FILE* out) {
  switch (outcome) {
    case Outcome::passed:
      std::fprintf(out, "  %-11s passed       %s\n", what, passed.c_str());
      return;
    case Outcome::failed:
      std::fprintf(out, "  %-11s FAILED\n", what);
      break;
    case Outcome::not_checked:
      std::fprintf(out, "  %-11s not checked\n", what);
      break;
  }
  constexpr std::size_t shown = 20;
  for (std::size_t i = 0; i < std::min(shown, findings.size()); ++i) {
    std::fprintf(out, "    %s\n", findings[i].c_str());
  }
  if (findings.size() > shown) {
    std::fprintf(out, "    and %zu more, all of them in --json\n", findings.size() - shown);
  }
}

std::string files_in_words(const Structure& s) {
  std::string out = std::to_string(s.copied) + " tensors are the source's";
  if (s.cast > 0) {
    out += ", " + std::to_string(s.cast) + " the source's in another dtype";
  }
  return out + "; of " + std::to_string(s.cast + s.converted) + " cast or converted, " +
         std::to_string(s.checked) + " have the checksum that convert wrote down";
}

std::string limits_in_words(const Limits& limits) {
  std::string out;
  for (const auto& [what, limit] : {std::pair("mean KL", limits.mean_kl), std::pair("nats", limits.nats),
                                    std::pair("relative logit error", limits.rel_logit_error),
                                    std::pair("attention error of every layer", limits.layer_error)}) {
    if (limit) {
      out += (out.empty() ? "" : ", ") + std::string(what) + " within " + number_text("%.3g", *limit);
    }
  }
  return out.empty() ? "all logits are finite; no limit was set" : out;
}

void print_evidence(const AllEvidence& all, const Limits& limits, FILE* out) {
  const Structure& s = all.structure;
  std::fputs("\n", out);
  print_findings("files", outcome_of(s.findings), files_in_words(s), s.findings, out);
  print_findings("finiteness", outcome_of(s.not_finite), "no tensor holds NaN or infinity", s.not_finite,
                 out);
  print_findings("function", all.function.outcome, limits_in_words(limits), all.function.findings, out);
  print_findings("prediction", all.prediction.outcome,
                 "what convert measured of every layer is measured again", all.prediction.findings, out);
  const Coverage& c = all.coverage;
  std::fprintf(out,
               "  %-11s the tokens reach %td of %td rows of the vocabulary and %td of %td positions; for the "
               "others only the files speak\n",
               "coverage", c.tokens_used, c.vocab_size, c.positions, c.max_position_embeddings);
}

void warn_of_length(const Options& options, const Model& source) {
  const Index most = source.config().max_position_embeddings;
  if (most > 0 && options.length > most) {
    std::fprintf(stderr,
                 "relatent: --length %lld is beyond the %td positions that the model is made for: what is "
                 "measured there says little\n",
                 static_cast<long long>(options.length), most);
  }
}

int run(const Options& options) {
  const Model source = Model::open(options.source, options.context);
  const Model converted = Model::open(options.converted);
  const Sequences sequences =
      read_sequences(options.tokens, options.length, options.sequences, source.config().vocab_size);
  warn_of_length(options, source);
  AllEvidence all;
  if (options.tp) {
    Progress progress("verify devices", options.quiet);
    all.devices = verify_devices(converted, sequences, *options.tp, std::ref(progress));
  }
  std::vector<std::string> unreadable;
  const std::optional<ConversionReport> report = find_report(converted, unreadable);
  all.structure = check_structure(source, converted, report);
  all.structure.findings.insert(all.structure.findings.begin(), unreadable.begin(), unreadable.end());
  std::vector<Sequences> runs = {sequences};
  if (report && report->probe && fits(*report->probe, source.config())) {
    runs.push_back(sequence_of(*report->probe));
  }
  std::vector<Verification> measured;
  {
    Progress progress("verify", options.quiet);
    measured = verify(source, converted, runs, std::ref(progress));
  }
  all.measured = std::move(measured.front());
  const Limits limits = with_defaults(options.limits, report);
  all.function = function_evidence(all.measured, all.devices, limits);
  all.prediction =
      prediction_evidence(report, runs.size() > 1 ? std::optional(measured.back()) : std::nullopt);
  all.coverage = coverage_of(sequences, source.config());
  const Verdict verdict = verdict_of(all, report);
  if (options.json) {
    nlohmann::ordered_json out = to_json(all.measured);
    out["evidence"] = to_json(all);
    out["verdict"] = verdict.text;
    out["why"] = verdict.why;
    if (all.devices) {
      out["devices"] = to_json(*all.devices);
    }
    add_cost(out);
    std::puts(out.dump().c_str());
  }
  if (!options.json || !options.quiet) {
    FILE* out = options.json ? stderr : stdout;
    print_table(options, all.measured, out);
    if (all.devices) {
      print_devices(*all.devices, out);
    }
    print_evidence(all, limits, out);
    std::fprintf(out, "\nverdict: %s: %s\n", verdict.text.c_str(), verdict.why.c_str());
  }
  if (!verdict.holds) {
    std::fprintf(stderr, "relatent: %s: %s: %s\n", options.converted.c_str(), verdict.text.c_str(),
                 verdict.why.c_str());
  }
  return verdict.holds ? 0 : 1;
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
  command->add_option("--max-kl", options->limits.mean_kl, "Exit 1 when the mean KL is above this");
  command->add_option("--max-nats", options->limits.nats,
                      "Exit 1 when more nats are lost than this, or gained");
  command->add_option(
      "--max-rel-error", options->limits.rel_logit_error,
      "Exit 1 when the relative logit error is above this (default of --method lossless: what "
      "rounding makes, 1e-5 in float32)");
  command->add_option("--max-layer-error", options->limits.layer_error,
                      "Exit 1 when the attention of any layer is further from the source's than this, "
                      "relative to it");
  command->add_flag("--json", options->json, "One JSON object on stdout, the table on stderr");
  command->add_flag("--quiet", options->quiet, "No progress");
  add_context_option(*command, options->context);
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace relatent
