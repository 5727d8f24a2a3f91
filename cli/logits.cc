#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "convert/compute/backend.h"
#include "formats/files.h"
#include "formats/npy.h"

namespace relatent {
namespace {

struct Options {
  std::string model;
  std::optional<Index> context;
  std::string tokens;
  std::string output;
  std::int64_t sequences = 1;
  std::int64_t length = 1024;
};

int run(const Options& options) {
  // First of all: a name that cannot be written to is better refused before the work than after it.
  PendingFile output(output_name(options.output));
  const Model model = Model::open(options.model, options.context);
  const Sequences sequences =
      read_sequences(options.tokens, options.length, options.sequences, model.config().vocab_size);
  Stream stream(model, sequences);
  for (Index i = 0; i < model.config().num_hidden_layers; ++i) {
    run_layer(backend().load_layer(model, i, DType::f32), stream);
  }
  write_float_array(output, {sequences.count, sequences.length, model.config().vocab_size},
                    [&](std::int64_t sequence) {
                      const MatrixF logits = backend().logits(model, stream, sequence);
                      return std::vector<float>(logits.data(), logits.data() + logits.size());
                    });
  return 0;
}

}  // namespace

void add_logits(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("logits", "Write a model's logits, to compare with another engine's");
  command->add_option("model", options->model, "Checkpoint folder")->required();
  command
      ->add_option("--tokens", options->tokens, "Token ids: one-dimensional .npy of uint16, int32 or int64")
      ->required();
  command
      ->add_option("-o,--output", options->output, "float32 .npy to write: [sequence, position, vocabulary]")
      ->required();
  command->add_option("--sequences", options->sequences, "Number of sequences")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--length", options->length, "Tokens per sequence")->capture_default_str();
  add_context_option(*command, options->context);
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace relatent
