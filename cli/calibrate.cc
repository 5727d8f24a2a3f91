#include "convert/calibrate/calibrate.h"

#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"
#include "cli/progress.h"
#include "convert/compute/backend.h"
#include "formats/error.h"
#include "formats/npy.h"

namespace relatent {
namespace {

struct Options {
  std::string model;
  std::optional<Index> context;
  std::string tokens;
  std::string output;
  std::int64_t sequences = 0;
  std::int64_t length = 1024;
  std::string compute = "auto";
  SaveOptions save;
  bool json = false;
  bool quiet = false;
};

// What the projections are multiplied in. Weights that are bfloat16 already lose nothing by it, and the
// activations are rounded as everybody who runs such a checkpoint rounds them.
DType compute_of(const std::string& wanted, const Model& model) {
  if (wanted == "auto") {
    const DType stored = model.checkpoint().info(model.name_of(Role::o_weight, 0)).dtype;
    return stored == DType::bf16 && backend().has_bf16() ? DType::bf16 : DType::f32;
  }
  if (wanted == "bfloat16" && !backend().has_bf16()) {
    fail_usage("--compute bfloat16: this processor has no bfloat16 products");
  }
  return *dtype_from_torch(wanted);
}

int run(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  const Model model = Model::open(options.model, options.context);
  const Sequences sequences =
      read_sequences(options.tokens, options.length, options.sequences, model.config().vocab_size);
  const DType compute = compute_of(options.compute, model);
  {
    Progress progress("calibrate", options.quiet, "layer",
                      {.tokens = static_cast<double>(sequences.count * sequences.length)});
    SaveOptions save = options.save;
    save.taken_up = say_taken_up(options.quiet);
    calibrate(model, sequences, options.output, std::ref(progress), save, compute);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::int64_t tokens = sequences.count * sequences.length;
  if (options.json) {
    nlohmann::ordered_json out = {{"tokens", tokens},
                                  {"sequences", sequences.count},
                                  {"length", sequences.length},
                                  {"compute", torch_name(compute)},
                                  {"seconds", seconds},
                                  {"bytes_read", model.checkpoint().tensor_bytes()},
                                  {"bytes_written", std::filesystem::file_size(options.output)}};
    add_cost(out);
    std::puts(out.dump().c_str());
  }
  if (!options.quiet) {
    std::fprintf(stderr, "calibrated on %lld tokens (%lld sequences of %lld) in %.1f s, peak memory %s: %s\n",
                 static_cast<long long>(tokens), static_cast<long long>(sequences.count),
                 static_cast<long long>(sequences.length), seconds, bytes_text(peak_rss_bytes()).c_str(),
                 options.output.c_str());
  }
  return 0;
}

}  // namespace

void add_calibrate(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("calibrate", "Run the source over tokens once and keep what conversion needs");
  command->add_option("model", options->model, "Checkpoint folder")->required();
  command
      ->add_option("--tokens", options->tokens, "Token ids: one-dimensional .npy of uint16, int32 or int64")
      ->required();
  command->add_option("-o,--output", options->output, "HDF5 file to write")->required();
  command->add_option("--sequences", options->sequences, "Number of sequences (default: all that fit)")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--length", options->length, "Tokens per sequence")->capture_default_str();
  command
      ->add_option(
          "--compute", options->compute,
          "Projections in float32 or bfloat16; auto: as the weights are stored, where the processor can")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16"}))
      ->capture_default_str();
  add_save_options(*command, options->save);
  command->add_flag("--json", options->json, "One JSON object on stdout");
  command->add_flag("--quiet", options->quiet, "No progress");
  add_context_option(*command, options->context);
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace relatent
