#include "convert/run/convert.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"
#include "cli/plan_output.h"
#include "cli/progress.h"
#include "convert/run/form_choice.h"
#include "formats/error.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

// Options that mean something to one method only.
struct Owned {
  const CLI::Option* option;
  std::vector<Method> methods;
};

struct Options {
  std::vector<Owned> owned;
  std::string method;
  std::string kv_budget;
  std::string shape;
  std::optional<double> max_nats;
  std::string dtype;
  std::string compute = "auto";
  std::string fold = "auto";
  std::string calibration;
  ConvertOptions convert;
  bool dry_run = false;
  bool json = false;
  bool quiet = false;
};

Json measured_json(const Measurement& measured) {
  const LogitComparison& logits = measured.logits;
  return {{"held_out", measured.held_out},
          {"tokens", logits.tokens},
          {"source_ppl", std::exp(logits.source_nll)},
          {"converted_ppl", std::exp(logits.converted_nll)},
          {"nats", measured.nats()},
          {"mean_kl", logits.mean_kl},
          {"top1_agreement", logits.top1_agreement}};
}

double to_number(const std::string& option, const std::string& value) {
  double out = 0;
  const auto [end, status] = std::from_chars(value.data(), value.data() + value.size(), out);
  if (status != std::errc() || end != value.data() + value.size()) {
    fail_usage(option + " takes a number or auto, not \"" + value + "\"");
  }
  return out;
}

CacheShape to_shape(const std::string& value) {
  CacheShape out;
  const char* end = value.data() + value.size();
  const auto latent = std::from_chars(value.data(), end, out.latent);
  if (latent.ec == std::errc() && latent.ptr != end && *latent.ptr == '+') {
    const auto rotary = std::from_chars(latent.ptr + 1, end, out.rotary);
    if (rotary.ec == std::errc() && rotary.ptr == end && out.latent > 0 && out.rotary > 0) {
      return out;
    }
  }
  fail_usage("--shape takes latent + rotary key, like 512+64, not \"" + value + "\"");
}

ConvertOptions resolve(const Options& options) {
  static const std::map<std::string, Method> methods = {{"lossless", Method::lossless},
                                                        {"transmla", Method::transmla},
                                                        {"relatent", Method::relatent},
                                                        {"weights-only", Method::weights_only}};
  ConvertOptions out = options.convert;
  const std::optional<Method> named =
      options.method.empty() ? std::nullopt : std::optional(methods.at(options.method));
  const bool calibrated = !options.calibration.empty();
  // Options are looked at as if there were a calibration: without one they may still stand in a script.
  out.method = chosen_method(named, true);
  for (const Owned& owned : options.owned) {
    if (owned.option->count() > 0 &&
        std::find(owned.methods.begin(), owned.methods.end(), out.method) == owned.methods.end()) {
      std::string owners;
      for (const Method method : owned.methods) {
        owners += (owners.empty() ? "" : " and ") + std::string(method_name(method));
      }
      fail_usage(owned.option->get_name() + " belongs to --method " + owners + ", not to " +
                 std::string(method_name(out.method)));
    }
  }
  if (const Method able = chosen_method(named, calibrated); able != out.method) {
    out.method = able;
  }
  if (options.kv_budget == "auto") {
    if (!options.max_nats) {
      fail_usage("--kv-budget auto needs --max-nats");
    }
    out.max_nats = options.max_nats;
  } else {
    if (options.max_nats) {
      fail_usage("--max-nats belongs to --kv-budget auto");
    }
    if (!options.kv_budget.empty()) {
      out.kv_budget = to_number("--kv-budget", options.kv_budget);
    }
  }
  if (!options.shape.empty()) {
    out.shape = to_shape(options.shape);
  }
  if (calibrated) {
    out.calibration = options.calibration;
  }
  if (options.compute != "auto") {
    out.compute = dtype_from_torch(options.compute);
  }
  if (!options.dtype.empty()) {
    out.dtype = dtype_from_torch(options.dtype);
  }
  if (options.fold != "auto") {
    try {
      std::size_t used = 0;
      out.fold = std::stoll(options.fold, &used);
      if (used != options.fold.size()) {
        throw std::invalid_argument(options.fold);
      }
    } catch (const std::exception&) {
      fail_usage("--fold takes a whole number or auto, not \"" + options.fold + "\"");
    }
  }
  return out;
}

// What --to auto would choose from, as options.
std::string said_forms(const std::vector<ConvertOptions>& candidates) {
  std::vector<std::string> out;
  out.reserve(candidates.size());
  for (const ConvertOptions& one : candidates) {
    out.push_back("--to " + one.form + " --branches " + std::to_string(*one.branches));
  }
  return "give " + join_words(out, "or");
}

void say_tried(const std::string& what, double nats) {
  std::fprintf(stderr, "tried %s: %.4f nats on held-out calibration tokens\n", what.c_str(), nats);
}

void say_trial(const SizeTrial& trial) {
  say_tried(sizes_text(trial), trial.nats);
}

void say_form_trial(const TriedForm& form) {
  say_tried(form_text(form.form, form.branches) + ", " + sizes_text(form.best), form.best.nats);
}

Json trial_json(const SizeTrial& trial) {
  return {{"rope_dim", trial.rope_dim},
          {"kv_rank", trial.rank},
          {"key_rank", trial.key_rank},
          {"nats", trial.nats}};
}

Json forms_json(const std::vector<TriedForm>& forms) {
  Json out = Json::array();
  for (const TriedForm& form : forms) {
    Json& one = out.emplace_back(Json{{"form", form.form}, {"branches", form.branches}});
    one.update(trial_json(form.best));
    one["searched"] = form.searched;
  }
  return out;
}

void print_forms(const ConvertOptions& options, const std::vector<TriedForm>& forms) {
  std::fprintf(stderr, "%s for %td devices of %td elements each. Nats in quick trials:",
               form_text(forms[0].form, forms[0].branches).c_str(), *options.devices, *options.per_device);
  for (std::size_t i = 0; i < forms.size(); ++i) {
    std::fprintf(stderr, "%s %s %.4f (%s%s)", i == 0 ? "" : ",",
                 form_text(forms[i].form, forms[i].branches).c_str(), forms[i].best.nats,
                 sizes_text(forms[i].best).c_str(), forms[i].searched ? "" : ", not searched");
  }
  std::fputs("\n", stderr);
}

// The object of --json.
Json result_json(const ConvertPlan& plan, const ConvertReport& report, const std::vector<TriedForm>& forms,
                 const std::vector<std::string>& readers, double seconds) {
  Json out = {{"kv_rank", report.kv_rank},
              {"rope_dim", report.rope_dim},
              {"form", plan.options.form},
              {"branches", report.branches},
              {"seconds", seconds},
              {"bytes_read", report.bytes_read},
              {"bytes_written", report.bytes_written}};
  if (plan.options.method == Method::relatent) {
    out["compute"] = torch_name(plan.options.relatent.compute);
  }
  out["bias_fold_error"] = report.fold_error;
  out["carried_layers"] = plan.carried.layers();
  out["cache_bytes_at_context"] = context_json(plan.source_context_bytes, plan.converted_context_bytes);
  out["measured"] = report.measured ? measured_json(*report.measured) : Json(nullptr);
  out["readers"] = readers;
  out["warnings"] = plan.warnings;
  for (const std::string& warning : report.warnings) {
    out["warnings"].push_back(warning);
  }
  out["trials"] = Json::array();
  for (const SizeTrial& trial : plan.trials) {
    out["trials"].push_back(trial_json(trial));
  }
  if (!forms.empty()) {
    out["forms"] = forms_json(forms);
  }
  if (report.fold) {
    out["fold"] = *report.fold;
  }
  add_cost(out);
  return out;
}

void print_result(const ConvertPlan& plan, const ConvertReport& report,
                  const std::vector<std::string>& readers, double seconds) {
  std::fprintf(
      stderr,
      "converted by %s: rotary %td + latent %td%s, cache %td of %td elements per token and layer, %.1f s, "
      "peak memory %s: %s\n",
      std::string(method_name(plan.options.method)).c_str(), report.rope_dim, report.kv_rank,
      report.fold ? (", fold " + std::to_string(*report.fold)).c_str() : "", plan.converted_cache_elements,
      plan.source_cache_elements, seconds, bytes_text(peak_rss_bytes()).c_str(), plan.options.output.c_str());
  if (!plan.carried.empty()) {
    std::fprintf(stderr, "carried as they are: layers %s\n", plan.carried.text().c_str());
  }
  std::fputs("cache bytes of a sequence:", stderr);
  for (std::size_t i = 0; i < reported_contexts.size(); ++i) {
    std::fprintf(stderr, "%s %td of %td at %s tokens", i == 0 ? "" : ",", plan.converted_context_bytes[i],
                 plan.source_context_bytes[i], context_text(reported_contexts[i]).c_str());
  }
  std::fputs("\n", stderr);
  std::fprintf(stderr, "%s\n",
               report.measured ? in_words(*report.measured).c_str()
                               : "not measured: `relatent verify` says how close it is");
  for (const std::string& reader : readers) {
    std::fprintf(stderr, "%s\n", reader.c_str());
  }
}

int run(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  ConvertOptions resolved = resolve(options);
  resolved.save.taken_up = say_taken_up(options.quiet);
  const bool any_form = resolved.form == any_form_name;
  if (resolved.devices && !any_form) {
    fail_usage("--devices belongs to --to auto; --to " + resolved.form +
               " has a device for each of --branches");
  }
  const std::vector<ConvertOptions> candidates =
      any_form ? form_candidates(resolved) : std::vector<ConvertOptions>{};
  if (any_form && options.dry_run) {
    fail_usage("--to auto is settled by trials, which a dry run does not make: " + said_forms(candidates));
  }
  ConvertInputs inputs = open_inputs(any_form ? candidates.front() : resolved);
  if (resolved.method == Method::weights_only && options.method != "weights-only") {
    std::fputs(
        "no --calibration: falling back to --method weights-only, the closed forms with the norm's gain in "
        "the place of data\n",
        stderr);
  }
  const std::unique_ptr<WorkFolder> work = options.dry_run ? nullptr : claim_output(resolved, inputs);
  std::vector<TriedForm> forms;
  if (any_form) {
    FormChoice choice = choose_form(candidates, *work, options.quiet ? FormWatch{} : say_form_trial);
    resolved = std::move(choice.options);
    forms = std::move(choice.tried);
    inputs = open_inputs(resolved);
  }
  const ConvertPlan plan = options.dry_run ? plan_without_trials(resolved, inputs)
                                           : plan_conversion(resolved, inputs, work.get(),
                                                             options.quiet ? SizeSearch::Watch{} : say_trial);
  for (const std::string& warning : plan.warnings) {
    std::fprintf(stderr, "warning: %s\n", warning.c_str());
  }
  if (options.dry_run) {
    if (options.json) {
      std::puts(plan_json(plan).dump().c_str());
    } else {
      print_plan(plan);
    }
    return 0;
  }
  ConvertReport report;
  {
    Progress progress("convert", options.quiet, "layer", {.bytes = static_cast<double>(plan.output_bytes)});
    report = convert(plan, inputs, *work, std::ref(progress));
  }
  // With the search for sizes, which people wait for too.
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::vector<std::string> readers = readers_of(Model::open(plan.options.output).config());
  if (options.json) {
    std::puts(result_json(plan, report, forms, readers, seconds).dump().c_str());
  }
  for (const std::string& warning : report.warnings) {
    std::fprintf(stderr, "warning: %s\n", warning.c_str());
  }
  if (!options.quiet) {
    print_result(plan, report, readers, seconds);
    if (!forms.empty()) {
      print_forms(plan.options, forms);
    }
  }
  return 0;
}

// An option of some methods only, which the others refuse.
void belongs_to(const std::vector<Method>& methods, CLI::Option* option, Options& options) {
  options.owned.push_back({option, methods});
}

void add_size_options(CLI::App& command, Options& options) {
  std::vector<std::string> known_forms = form_names();
  known_forms.emplace_back(any_form_name);
  command
      .add_option(
          "--to", options.convert.form,
          "mla: one latent, whole on every device; gla: a latent for each group of heads; tpla, mlra: "
          "latents that all heads read and devices split; auto: of those that --devices can split, the one "
          "that loses least")
      ->check(CLI::IsMember(known_forms))
      ->capture_default_str();
  command
      .add_option("--branches", options.convert.branches,
                  "gla, tpla: number of latents; mlra: 2 or 4, each of four latents")
      ->check(CLI::Range(2, 1024));
  command.add_option(
      "--per-device", options.convert.per_device,
      "gla, tpla, mlra: elements per token and layer in the cache of each device, one device for "
      "each latent");
  command.add_option("--devices", options.convert.devices,
                     "With --to auto: tensor-parallel devices, one for each latent");
  command.add_option("--key-rank", options.convert.key_rank,
                     "tpla, mlra: latent coordinates that all parts share and scores read");
  command
      .add_option("--method", options.method,
                  "lossless: same cache, same output; relatent (default): the closest; transmla: the "
                  "published conversion; weights-only (default without calibration)")
      ->check(CLI::IsMember({"lossless", "relatent", "transmla", "weights-only"}));
  command.add_option("--layers", options.convert.layers,
                     "Layers to convert, e.g. 0-5,8; the others stay as they are (default: those without a "
                     "sliding window, which bounds the cache already)");
  command.add_option("--calibration", options.calibration, "File made by `relatent calibrate`");
  command.add_option("--rank", options.convert.rank, "Size of the latent, of all latents together");
  command.add_option("--rope-dim", options.convert.rope_dim,
                     "Size of the rotary key (default: the head size; with relatent and a budget, the best "
                     "of a few that are tried)");
  command.add_option(
      "--shape", options.shape,
      "mla: latent + rotary key as the kernels of an engine want them, e.g. 512+64 or 256+64; "
      "what --rank or --kv-budget leaves of it stays empty (default where the budget comes near "
      "one of these, or nothing is said)");
  command.add_option("--kv-budget", options.kv_budget,
                     "(rank + rotary) as a part of the source's cache, e.g. 0.25; auto: the smallest that "
                     "stays within --max-nats");
  command
      .add_option("--max-nats", options.max_nats,
                  "With --kv-budget auto: most nats to lose on calibration tokens held out for it")
      ->check(CLI::PositiveNumber);
}

void add_transmla_options(CLI::App& command, Options& options) {
  const auto owned = [&](CLI::Option* option) { belongs_to({Method::transmla}, option, options); };
  owned(command.add_option("--fold", options.fold, "transmla: frequencies that share one PCA, or auto")
            ->capture_default_str());
  owned(command
            .add_option("--balance", options.convert.balance,
                        "transmla: key norm over value norm after balancing; 0 = off")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str());
  owned(command.add_option("--q-rank", options.convert.q_rank, "transmla: compress the query too"));
}

void set_effort(const std::string& name, FitOptions& fit) {
  fit.queries = fit.keys = name != "low";
  if (name == "high") {
    fit.rounds = 4;
    fit.output_rounds = 1;
    fit.stride = 4;
  } else if (name == "max") {
    fit.rounds = 6;
    fit.output_rounds = 2;
    fit.stride = 1;
  }
}

void add_relatent_options(CLI::App& command, Options& options) {
  const auto owned = [&](CLI::Option* option, const std::vector<Method>& methods) {
    belongs_to(methods, option, options);
  };
  const std::vector<Method> closed = {Method::relatent, Method::weights_only};
  const std::vector<Method> fitted = {Method::relatent};
  RelatentOptions& own = options.convert.relatent;
  // Before the options that it sets, so that these win.
  owned(command
            .add_option_function<std::string>(
                "--effort", [&own](const std::string& name) { set_effort(name, own.fit); },
                "relatent: how long the fits may take: low leaves queries and keys as the closed forms give "
                "them, high and max fit them on more positions, in more rounds and to the layer's output")
            ->check(CLI::IsMember({"low", "default", "high", "max"})),
        fitted);
  owned(command
            .add_option("--fit-rounds", own.fit.rounds,
                        "relatent: how often queries and keys are fitted in turn")
            ->check(CLI::Range(1, 100))
            ->capture_default_str(),
        fitted);
  owned(command
            .add_option("--output-rounds", own.fit.output_rounds,
                        "relatent: how often queries and keys are then moved together towards the layer's "
                        "output; each takes about as long as two rounds")
            ->check(CLI::Range(0, 100))
            ->capture_default_str(),
        fitted);
  owned(command
            .add_option("--fit-tokens", own.fit.tokens,
                        "relatent: fit on so many tokens of the calibration; 0 = all, slower and closer")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str(),
        fitted);
  owned(command
            .add_option("--fit-stride", own.fit.stride,
                        "relatent: fit on the queries of every n-th position; 1 is slower and closer")
            ->check(CLI::PositiveNumber)
            ->capture_default_str(),
        fitted);
  owned(command
            .add_option("--compute", options.compute,
                        "relatent: large products of the fits in float32 or bfloat16; auto: as the "
                        "calibration was made, where the processor can")
            ->check(CLI::IsMember({"auto", "float32", "bfloat16"}))
            ->capture_default_str(),
        fitted);
  command
      .add_option_function<std::string>(
          "--order",
          [&own](const std::string& name) {
            own.order = name == "pca"        ? LatentOrder::pca
                        : name == "hadamard" ? LatentOrder::hadamard
                                             : LatentOrder::shared;
          },
          "tpla: shared key and split value (shared, the default), or the published slices of one latent "
          "(pca, "
          "hadamard)")
      ->check(CLI::IsMember({"shared", "pca", "hadamard"}));
  const auto stage = [&](const char* flag, bool& on, const std::vector<Method>& methods, const char* what) {
    owned(command.add_flag_callback(
              flag, [&on] { on = false; }, what),
          methods);
  };
  stage("--no-expected-rotation", own.expected_rotation, closed,
        "relatent: put 1 where a rotation is dropped");
  stage("--no-output-metric", own.output_metric, closed, "relatent: plain PCA for the latent");
  stage("--no-query-fit", own.fit.queries, fitted,
        "relatent: leave the queries as the closed forms give them");
  stage("--no-key-fit", own.fit.keys, fitted, "relatent: likewise rotary key and latent");
  stage("--no-refit", own.fit.refit, fitted, "relatent: leave o_proj alone");
  owned(command.add_flag_callback(
            "--plain-list", [&own] { own.plain_list = true; },
            "relatent: a geometric list of rotary frequencies, each once"),
        closed);
  owned(command.add_flag_callback(
            "--one-list", [&options] { options.convert.one_list = true; },
            "relatent: layers share their rotary frequencies where the engine could hold a list for each"),
        closed);
}

void add_engine_options(CLI::App& command, Options& options) {
  command
      .add_option(
          "--engine", options.convert.engine,
          "Who is to load the result: transformers (stock, and vLLM through its transformers backend); "
          "relatent (the own layout: vLLM with the plug-in, transformers with the code beside it); "
          "deepseek (no biases: vLLM, SGLang); gguf (likewise, a file for llama.cpp); mlra, gla (the "
          "authors' code)")
      ->check(CLI::IsMember(engine_names()))
      ->capture_default_str();
  command.add_option(
      "--pre-tokenizer", options.convert.pre_tokenizer,
      "gguf: llama.cpp's name for how the tokenizer cuts text, e.g. llama-bpe or qwen2; no_vocab "
      "leaves the tokenizer out (default: found from tokenizer.json)");
  command
      .add_option("--norm-coordinates", options.convert.norm_coordinates,
                  "deepseek, gguf, mlra: coordinates added to each latent to steady its norm (default 2)")
      ->check(CLI::NonNegativeNumber);
  command.add_option("--pad-rank", options.convert.pad_rank,
                     "deepseek: add as many as bring kv_lora_rank to this, e.g. 512");
}

void add_output_options(CLI::App& command, Options& options) {
  command
      .add_option("--dtype", options.dtype,
                  "Weights as bfloat16, float16 or float32 (default: as the source)")
      ->check(CLI::IsMember({"bfloat16", "float16", "float32"}));
  command.add_option("--max-shard-size", options.convert.max_shard_bytes, "Largest weight file, e.g. 5GB")
      ->transform(CLI::AsSizeValue(true))
      ->default_str("5GB");
  command
      .add_option(
          "--held-out", options.convert.held_out,
          "Calibration sequences that the fits leave alone and the result is measured on (default: one "
          "of 32, at most 4; 0: all are fitted on and nothing is measured)")
      ->check(CLI::NonNegativeNumber);
  add_save_options(command, options.convert.save);
  command.add_flag(
      "--dry-run", options.dry_run,
      "Print what would be written and what it takes, from headers alone (lossless: keys and values too); "
      "write nothing, and try no sizes");
  command.add_flag("--json", options.json, "One JSON object on stdout");
  command.add_flag("--quiet", options.quiet, "No progress");
}

}  // namespace

void add_convert(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("convert", "Rewrite a GQA checkpoint into latent attention");
  command->add_option("model", options->convert.source, "Source checkpoint folder")->required();
  command->add_option("-o,--output", options->convert.output, "Folder (gguf: file) to make; must not exist")
      ->required();
  add_size_options(*command, *options);
  add_transmla_options(*command, *options);
  add_relatent_options(*command, *options);
  add_engine_options(*command, *options);
  add_output_options(*command, *options);
  add_context_option(*command, options->convert.context);
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace relatent
