#include "convert/plan/inputs.h"

#include <algorithm>
#include <string>
#include <string_view>

#include "convert/plan/layer_choice.h"
#include "formats/error.h"

namespace relatent {
namespace {

// Distances assumed when there is no calibration.
constexpr Index assumed_length = 1024;
// Fewer sequences than this are all fitted on, and one of so many, up to the most, is kept from the fits.
constexpr Index fewest_sequences = 8;
constexpr Index one_of = 32;
constexpr Index most_held_out = 4;

// What is read of the file has the sizes of its header, whatever checkpoint the header names.
void check_sizes(const CalibrationFile& calibration, const Model& source) {
  const CalibrationHeader& header = calibration.header();
  const ModelConfig& config = source.config();
  const auto check = [&](const char* name, Index expected, Index found) {
    if (found != expected) {
      fail_input({calibration.path(), "",
                  std::string("made from another checkpoint than ") + source.checkpoint().path().string() +
                      ": attribute " + name,
                  std::to_string(expected), std::to_string(found), "run `relatent calibrate` on it"});
    }
  };
  check("num_hidden_layers", config.num_hidden_layers, header.num_hidden_layers);
  check("hidden_size", config.hidden_size, header.hidden_size);
  check("num_attention_heads", config.num_attention_heads, header.num_attention_heads);
  const bool normed = normalises_keys(config);
  check("num_key_value_heads", normed ? config.gqa->num_key_value_heads : 0, header.num_key_value_heads);
  check("head_dim", normed ? config.gqa->head_dim : 0, header.head_dim);
}

}  // namespace

ConvertInputs open_inputs(const ConvertOptions& options) {
  ConvertInputs out{
      Model::open(options.source, options.context), nullptr, {}, find_form(options.form), {}, {}};
  out.carried = carried_layers(options.layers, out.source);
  out.engine = make_engine(options.engine, options.form, &out.source.config(), !out.carried.empty());
  static_cast<void>(out.source.folder("converted"));
  if (out.form == nullptr) {
    fail_usage("--to " + options.form + " is not one of: " + join_words(form_names(), "or"));
  }
  if (!out.engine) {
    const std::vector<std::string> names = engine_names();
    const bool known = std::find(names.begin(), names.end(), options.engine) != names.end();
    fail_usage(known ? "--engine " + options.engine + " has no layout for --to " + options.form
                     : "--engine " + options.engine + " is not one of: " + join_words(names, "or"));
  }
  if (const std::string why = out.engine->why_not_source(out.source.config()); !why.empty()) {
    fail_usage("--engine " + options.engine + ": " + why + ", which --engine relatent has");
  }
  if (!out.carried.empty() && !out.engine->traits().layer_kinds) {
    fail_usage("--engine " + options.engine + " has no place for layers that stay grouped-query attention (" +
               out.carried.text() + "), which --engine relatent has");
  }
  if (!out.engine->traits().single_file) {
    // Refuses links out of the checkpoint before anything is done.
    static_cast<void>(out.source.folder("converted").side_files());
  }
  const std::optional<Partition> partition = out.form->partition(options.branches);
  if (!partition) {
    fail_usage("--to " + options.form + " " + std::string(out.form->branches));
  }
  out.partition = *partition;
  if (const Index heads = out.source.config().num_attention_heads; partition->groups > heads) {
    fail_usage("--branches " + std::to_string(partition->groups) + " is more than the model's " +
               std::to_string(heads) + " heads");
  }
  if (options.method == Method::transmla && !out.partition.whole()) {
    fail_usage("--method transmla writes --to mla only");
  }
  if ((options.method == Method::transmla || options.method == Method::relatent) && !options.calibration) {
    fail_usage("--method " + std::string(method_name(options.method)) +
               " needs --calibration (make one with `relatent calibrate`)");
  }
  if (options.calibration) {
    out.calibration = CalibrationFile::open(*options.calibration);
    check_sizes(*out.calibration, out.source);
  }
  return out;
}

bool reads_normed_heads(const ConvertInputs& inputs) {
  return normalises_keys(inputs.source.config()) && inputs.engine->traits().normed_heads;
}

const Rotary& converted_rotary(const ConvertInputs& inputs) {
  return inputs.source.config().shared_rotary(converted_layers(inputs));
}

void check_calibration(const ConvertInputs& inputs) {
  const std::string found = inputs.source.checkpoint().fingerprint();
  if (inputs.calibration->header().source_fingerprint != found) {
    fail_input({inputs.calibration->path(), "",
                "made from another checkpoint than " + inputs.source.checkpoint().path().string(),
                "fingerprint " + found, inputs.calibration->header().source_fingerprint,
                "run `relatent calibrate` on it"});
  }
  const Index vocab = inputs.source.config().vocab_size;
  for (const std::int32_t token : inputs.calibration->sequences().tokens) {
    if (token >= vocab) {
      fail_input({inputs.calibration->path(), "", "dataset /tokens holds an id that the model does not have",
                  "ids below vocab_size " + std::to_string(vocab), std::to_string(token),
                  "run `relatent calibrate` again"});
    }
  }
}

Moments input_moments(const ConvertInputs& inputs, Index layer_idx) {
  const bool normed = reads_normed_heads(inputs);
  if (inputs.calibration) {
    const LayerMoments layer = inputs.calibration->layer(layer_idx);
    return normed ? normed_moments_of(layer) : moments_of(layer);
  }
  RmsNorm norm = inputs.source.input_norm(layer_idx);
  if (!norm.present()) {
    norm.gain = RowVectorF::Ones(inputs.source.config().hidden_size);
  }
  if (normed) {
    return normed_moments_without_data(norm, std::get<GqaAttention>(inputs.source.attention(layer_idx)),
                                       assumed_length);
  }
  return moments_without_data(norm, inputs.source.config().num_attention_heads, assumed_length);
}

Index default_held_out(Index count) {
  return count < fewest_sequences ? 0 : std::clamp<Index>(count / one_of, 1, most_held_out);
}

Index held_out_sequences(const ConvertOptions& options, const ConvertInputs& inputs) {
  const Index count = inputs.calibration->sequences().count;
  return std::min<Index>(options.held_out.value_or(default_held_out(count)), count - 1);
}

Sequences fit_sequences(const ConvertOptions& options, const ConvertInputs& inputs) {
  const Sequences all = inputs.calibration->sequences();
  Sequences out = first_sequences(all, all.count - held_out_sequences(options, inputs));
  if (options.relatent.fit.tokens > 0) {
    const Index count = std::max<Index>(1, options.relatent.fit.tokens / out.length);
    out = first_sequences(std::move(out), count);
  }
  return out;
}

}  // namespace relatent
