#include "convert/plan/checks.h"

#include "convert/model/head_layout.h"
#include "formats/error.h"

namespace relatent {
namespace {

bool is_mlp_bias(Role role) {
  return role == Role::gate_bias || role == Role::up_bias || role == Role::down_bias;
}

void check_plain_rotary(const Model& source, const Rotary& rotary) {
  if (rotary.rope_type != "default") {
    fail_input({source.checkpoint().config_path(), "", "has no place in a plain list of rotary frequencies",
                "rope_type default", rotary.rope_type, ""});
  }
}

// Of heads that rotate in part, or in pairs side by side.
void check_partial_rotary(const ConvertOptions& options, const ConvertInputs& inputs) {
  const std::filesystem::path path = inputs.source.checkpoint().config_path();
  if (options.method == Method::transmla) {
    fail_input({path, "", "partial_rotary_factor", "1, since --method transmla rotates whole heads",
                "heads that rotate in part", "--method relatent takes them"});
  }
  if (!inputs.carried.empty()) {
    fail_input({path, "", "partial_rotary_factor",
                "1, since layers that stay as they are rotate whole heads (" + inputs.carried.text() + ")",
                "heads that rotate in part", "convert every layer"});
  }
}

}  // namespace

void check_source(const Model& source) {
  const ModelConfig& config = source.config();
  const std::filesystem::path path = source.checkpoint().config_path();
  if (config.latent && config.gqa) {
    fail_input({path, "", "layers", "a grouped-query or MLA model", "layers of both kinds",
                "a model that is converted in part is a result, not a source"});
  }
  if (config.latent && config.latent->branches.size() != 1) {
    fail_input({path, "", "latent_form", "a grouped-query or MLA model", config.latent->form,
                "a model whose latents are partitioned already is a result, not a source"});
  }
  if (config.latent && config.latent->attention_bias) {
    fail_input({path, "", "attention_bias", "false", "true",
                "the norm of a latent with biases cannot be kept when the latent is divided"});
  }
  for (const PlacedTensor& tensor : source.tensors()) {
    if (is_mlp_bias(tensor.role)) {
      fail_input({source.checkpoint().path(), tensor.name, "has no place in a latent layout",
                  "an MLP without biases", "a bias", ""});
    }
  }
}

bool only_relays_out(const ConvertOptions& options, const ConvertInputs& inputs) {
  return options.method == Method::lossless && inputs.partition.whole() &&
         inputs.source.config().latent.has_value() && inputs.engine->traits().normed_latent;
}

void check_engine(const ConvertOptions& options, const ConvertInputs& inputs) {
  const Model& source = inputs.source;
  if (source.config().gqa && !has_plain_heads(*source.config().gqa)) {
    check_partial_rotary(options, inputs);
  }
  if (options.method == Method::transmla && !source.config().still_layers().empty()) {
    fail_input({source.checkpoint().config_path(), "", "no_rope_layers",
                "every layer rotated, since --method transmla has one rotary key for all",
                "layers that are not (" + source.config().still_layers().text() + ")",
                "--method relatent takes them"});
  }
  const EngineTraits traits = inputs.engine->traits();
  if (!options.pre_tokenizer.empty() && !traits.single_file) {
    fail_usage("--pre-tokenizer belongs to --engine " +
               join_words(engine_names([](const EngineTraits& t) { return t.single_file; })) + ", not to " +
               options.engine);
  }
  if (!traits.latent_source && source.config().latent) {
    fail_usage("--engine " + options.engine +
               " normalises every latent on its own, which is not what an MLA source does: --engine "
               "transformers has a place for it");
  }
  if (traits.must_tie && !source.config().tie_word_embeddings) {
    fail_input({source.checkpoint().config_path(), "", "tie_word_embeddings",
                "true, since --engine " + options.engine + " has no output head of its own", "false", ""});
  }
  if (!traits.any_frequencies && !traits.normed_latent) {
    check_plain_rotary(source, converted_rotary(inputs));
  }
  if (!traits.normed_latent) {
    if (options.norm_coordinates || options.pad_rank) {
      fail_usage("--norm-coordinates and --pad-rank belong to --engine " +
                 join_words(engine_names([](const EngineTraits& t) { return t.normed_latent; })) +
                 ", not to " + options.engine);
    }
    if (!traits.any_frequencies && options.method == Method::lossless) {
      fail_usage(
          "--engine " + options.engine +
          " has one plain list of rotary frequencies, and --method lossless keeps one for each key head");
    }
    return;
  }
  if (options.method != Method::relatent && !only_relays_out(options, inputs)) {
    fail_usage("--engine " + options.engine +
               " normalises the latent and has no biases: only --method relatent fits a checkpoint to that");
  }
  check_plain_rotary(source, converted_rotary(inputs));
  const Index first = converted_layers(inputs).layers().front();
  if (source.has(Role::o_bias, first)) {
    fail_input({source.checkpoint().path(), source.name_of(Role::o_bias, first),
                "has no place in a layout without biases", "an o_proj without a bias", "one", ""});
  }
  if (options.pad_rank && !inputs.partition.whole()) {
    fail_usage("--pad-rank is the size of one latent, --to mla: give --norm-coordinates");
  }
  if (options.pad_rank && options.norm_coordinates) {
    fail_usage("--pad-rank decides how many coordinates are added: leave out --norm-coordinates");
  }
}

}  // namespace relatent
