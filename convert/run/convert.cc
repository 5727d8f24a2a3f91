#include "convert/run/convert.h"

#include <algorithm>
#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "convert/methods/layer_pipeline.h"
#include "convert/methods/method.h"
#include "convert/plan/memory.h"
#include "convert/plan/run_identity.h"
#include "convert/run/losses.h"
#include "convert/run/output.h"
#include "convert/run/size_choice.h"
#include "convert/verify/conversion_report.h"
#include "formats/files.h"
#include "formats/mapped_file.h"
#include "linalg/decompose.h"
#include "linalg/heap.h"

namespace relatent {
namespace {

// Entries of the journal.
constexpr const char* fold_entry = "fold";
constexpr const char* fold_error_entry = "fold error";
constexpr const char* measured_entry = "measured";

// Nothing is written for a layer that is carried.
using WriteLayer = std::function<void(Index, const std::optional<LatentAttention>&)>;

// What engines write must be what the layer has, but where it does not rotate.
void check_rotary(const Rotary& all, const LatentAttention& layer) {
  const Rotary& found = layer.rotary;
  const bool still = found.rotating_pairs() == 0 && found.attention_factor == 1 &&
                     found.inv_freq.size() == all.inv_freq.size();
  if (!still && (found.inv_freq != all.inv_freq || found.attention_factor != all.attention_factor)) {
    throw std::logic_error("convert: a layer has other rotary frequencies than its method says");
  }
}

// Runs work for a layer, whose number a failure of the numerics then names.
template <typename Work>
auto for_layer(Index layer_idx, const Work& work) {
  try {
    return work();
  } catch (const NumericalError& error) {
    throw NumericalError("layer " + std::to_string(layer_idx) + ": " + error.what());
  }
}

// Side by side, as many layers as memory allows.
void convert_independently(const ConversionMethod& method, const ConvertPlan& plan,
                           const ConvertInputs& inputs, Index first, const WriteLayer& write,
                           ConvertedOutput& output) {
  const Index layers = inputs.source.config().num_hidden_layers;
  std::vector<std::optional<LatentAttention>> converted(static_cast<std::size_t>(layers));
  run_layer_pipeline(
      first, layers, layers_at_once(plan.layer_bytes),
      {.moments =
           [&](Index layer_idx) {
             return inputs.carried.has(layer_idx) ? Moments{} : input_moments(inputs, layer_idx);
           },
       .body =
           [&](Index layer_idx, Moments moments) {
             if (inputs.carried.has(layer_idx)) {
               return;
             }
             converted[static_cast<std::size_t>(layer_idx)] =
                 for_layer(layer_idx, [&] { return method.convert(layer_idx, std::move(moments)); });
           },
       .finish =
           [&](Index layer_idx) {
             auto& layer = converted[static_cast<std::size_t>(layer_idx)];
             write(layer_idx, layer);
             layer.reset();
             if (layer_idx + 1 < layers) {
               output.save(layer_idx + 1, {});
             }
           },
       .beside = [&] { output.copy_tensors(); }});
}

// Every layer depends on those before it.
void convert_in_sequence(ConversionMethod& method, const ConvertInputs& inputs, Index first,
                         const WriteLayer& write, ConvertedOutput& output) {
  const Index layers = inputs.source.config().num_hidden_layers;
  output.copy_tensors();
  for (Index i = first; i < layers; ++i) {
    write(i, for_layer(i, [&] { return method.next(); }));
    return_freed_memory();
    if (i + 1 < layers) {
      output.save(i + 1, [&](const std::filesystem::path& path) { method.save(path); });
    }
  }
}

// Converts and writes all layers and the files beside them. Returns the checksums of what was computed.
std::map<std::string, std::string> write_output(const ConvertPlan& plan, const ConvertInputs& inputs,
                                                WorkFolder& work, const LayerProgress& progress,
                                                ConvertReport& report) {
  std::unique_ptr<ConversionMethod> method = make_method(plan, inputs, report.fold);
  const std::vector<Rotary> rotaries = method->rotaries();
  const LayerSet converted = converted_layers(inputs);
  ConvertedOutput output(plan, inputs, rotaries, work);
  // One layer at least is converted again, so that there is progress to report.
  const Index layers = inputs.source.config().num_hidden_layers;
  const Index done = std::min(output.layers_done(), layers - 1);
  Index first = method->resume(output.state_file(), done);
  if (!output.has_layers(first)) {
    // The state is ahead of a journal that has lost its end.
    method = make_method(plan, inputs, report.fold);
    first = 0;
  }
  output.keep_layers(first);
  const WriteLayer write = [&](Index layer_idx, const std::optional<LatentAttention>& attention) {
    if (attention) {
      const Index place = rotaries.size() > 1 ? converted.before(layer_idx) : 0;
      check_rotary(rotaries[static_cast<std::size_t>(place)], *attention);
      output.write_layer(layer_idx, *attention);
    }
    progress(layer_idx + 1, layers);
  };
  if (method->independent()) {
    convert_independently(*method, plan, inputs, first, write, output);
  } else {
    convert_in_sequence(*method, inputs, first, write, output);
  }
  report.fold_error = method->fold_error();
  output.finish();
  report.bytes_written = output.bytes_written();
  return output.checksums();
}

// conversion_report.json, for verify. A single file has no place for it.
void write_report(const ConvertPlan& plan, const ConvertInputs& inputs, const std::filesystem::path& folder,
                  std::map<std::string, std::string> checksums, const std::optional<Measurement>& measured) {
  if (inputs.engine->traits().single_file) {
    return;
  }
  ConversionReport report;
  report.version = program_identity().front().second;
  report.method = method_name(plan.options.method);
  report.form = plan.options.form;
  report.engine = plan.options.engine;
  report.dtype = safetensors_name(plan.dtype);
  report.source_config = checksum_of(inputs.source.checkpoint().config_path());
  report.files = file_checksums(folder);
  report.tensors = std::move(checksums);
  if (measured) {
    report.probe = measured->probe;
  }
  write_text(folder / kReportName, report.text());
}

// Runs what was written on the sequences that the fits left alone.
Measurement measure_output(const ConvertPlan& plan, const ConvertInputs& inputs, const WorkFolder& work) {
  const Index held = held_out_sequences(plan.options, inputs);
  const Sequences& all = inputs.calibration->sequences();
  const Index count = held > 0 ? held : std::min<Index>(all.count, 2);
  return measure(inputs.source, work.output(), last_sequences(all, count),
                 held > 0 && plan.options.method == Method::relatent);
}

std::uint64_t weight_bytes(const std::filesystem::path& output) {
  if (!std::filesystem::is_directory(output)) {
    return std::filesystem::file_size(output);
  }
  std::uint64_t out = 0;
  for (const auto& entry : std::filesystem::directory_iterator(output)) {
    out += entry.path().extension() == ".safetensors" ? entry.file_size() : 0;
  }
  return out;
}

// The fold that all layers share: given, chosen by the run that is continued, or chosen now.
std::optional<Index> settled_fold(const ConvertPlan& plan, const ConvertInputs& inputs, WorkFolder& work) {
  if (plan.options.method != Method::transmla) {
    return std::nullopt;
  }
  if (plan.options.fold) {
    return plan.options.fold;
  }
  if (work.journal().last(fold_entry)) {
    return work.journal().last_number(fold_entry);
  }
  if (work.complete()) {
    return std::nullopt;
  }
  const Index chosen = choose_fold(plan, inputs);
  work.record(fold_entry, chosen);
  return chosen;
}

}  // namespace

std::unique_ptr<WorkFolder> claim_output(const ConvertOptions& options, const ConvertInputs& inputs) {
  const RunIdentity identity =
      run_identity(with_compute_type(options, inputs), inputs.source.folder("converted"));
  const OutputKind kind = inputs.engine->traits().single_file ? OutputKind::new_file : OutputKind::new_folder;
  auto work = std::make_unique<WorkFolder>(options.output, kind, identity, options.save.resume);
  if (work->resumed() && options.save.taken_up) {
    options.save.taken_up();
  }
  return work;
}

ConvertPlan plan_conversion(const ConvertOptions& options, const ConvertInputs& inputs, WorkFolder* work,
                            const SizeSearch::Watch& watch) {
  ConvertPlan out;
  const auto plan = [&] {
    SizeChoice choice = choose_sizes_by_trials(completed(options, inputs), inputs, work, watch);
    out = make_plan(choice.options, inputs);
    out.trials = std::move(choice.trials);
    out.warnings.insert(out.warnings.end(), choice.warnings.begin(), choice.warnings.end());
  };
  if (work != nullptr) {
    work->run(plan);
  } else {
    plan();
  }
  return out;
}

ConvertPlan plan_without_trials(const ConvertOptions& options, const ConvertInputs& inputs) {
  SizeChoice choice = assume_sizes(completed(options, inputs), inputs);
  ConvertPlan out = make_plan(choice.options, inputs);
  out.open = std::move(choice.open);
  return out;
}

ConvertReport convert(const ConvertPlan& plan, const ConvertInputs& inputs, WorkFolder& work,
                      const LayerProgress& progress) {
  ConvertReport report;
  report.kv_rank = plan.shape.kv_lora_rank;
  report.rope_dim = plan.shape.qk_rope_head_dim;
  report.branches = inputs.partition.latents();
  report.bytes_read = inputs.source.checkpoint().tensor_bytes();
  work.run([&] {
    if (work.complete()) {
      report.fold = settled_fold(plan, inputs, work);
      std::istringstream(work.journal().last(fold_error_entry).value_or("0")) >> report.fold_error;
      report.measured = measurement_from(work.journal().last(measured_entry).value_or(""));
      report.bytes_written = weight_bytes(plan.options.output);
    } else {
      if (inputs.calibration) {
        check_calibration(inputs);
      }
      report.fold = settled_fold(plan, inputs, work);
      std::map<std::string, std::string> checksums = write_output(plan, inputs, work, progress, report);
      if (report.fold_error > 0) {
        work.record(fold_error_entry, exact_text(report.fold_error));
      }
      if (inputs.calibration && plan.options.held_out.value_or(1) > 0) {
        report.measured = measure_output(plan, inputs, work);
        work.record(measured_entry, to_text(*report.measured));
      }
      if (inputs.calibration) {
        inputs.calibration->require_unchanged();
      }
      require_unchanged_inputs(work.journal().given(), plan.options, inputs.source.folder("converted"));
      write_report(plan, inputs, work.output(), std::move(checksums), report.measured);
    }
    report.warnings = loss_warnings(plan, inputs, report.fold_error, report.measured);
    work.commit();
  });
  return report;
}

}  // namespace relatent
