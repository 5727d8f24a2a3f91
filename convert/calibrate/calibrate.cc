#include "convert/calibrate/calibrate.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <vector>

#include "convert/compute/backend.h"
#include "formats/error.h"
#include "formats/hash.h"
#include "formats/state_file.h"
#include "formats/work_folder.h"
#include "linalg/heap.h"

namespace relatent {
namespace {

// The file with the stream after the layers done, in the work folder, and the entry that says how many.
constexpr const char* state_name = "stream";
constexpr const char* layers_entry = "layers";

RunIdentity run_identity(const Model& model, const Sequences& sequences, DType compute) {
  RunIdentity out = program_identity();
  out.emplace_back("--sequences", std::to_string(sequences.count));
  out.emplace_back("--length", std::to_string(sequences.length));
  out.emplace_back("--compute", torch_name(compute));
  Hasher tokens;
  tokens.add(bytes_of(sequences.tokens));
  out.emplace_back("the checksum of the tokens", tokens.hexadecimal());
  // --context chooses between lists.
  Hasher frequencies;
  frequencies.add(bytes_of(model.config().rotary.inv_freq));
  out.emplace_back("the checksum of the rotary frequencies", frequencies.hexadecimal());
  add_source_identity(model.folder("calibrated"), out);
  return out;
}

std::filesystem::path layer_file(const WorkFolder& work, Index layer_idx) {
  return work.file("layer-" + std::to_string(layer_idx));
}

// All numbers of a layer, in the order in which its file holds them.
template <typename Moments>
auto numbers_of(Moments& moments) {
  const auto numbers = [](auto& dense) {
    return std::span(dense.data(), static_cast<std::size_t>(dense.size()));
  };
  std::vector<decltype(numbers(moments.mean))> out = {
      numbers(moments.second_moment), numbers(moments.mean),          numbers(moments.received_moment),
      numbers(moments.received_mean), numbers(moments.distance_mass), numbers(moments.mass_square),
      numbers(moments.score_effect)};
  if (moments.normed_heads) {
    auto& heads = *moments.normed_heads;
    out.insert(out.end(), {numbers(heads.feature_moment), numbers(heads.feature_mean),
                           numbers(heads.query_moment), numbers(heads.query_mean), numbers(heads.cross)});
  }
  return out;
}

// Numbers that are none come from weights that are none, which are named, or grew out of range on the way.
void require_finite(const Model& model, Index layer_idx, const LayerMoments& moments) {
  const std::vector<std::span<const double>> all = numbers_of(moments);
  const auto finite = [](std::span<const double> numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](double number) { return std::isfinite(number); });
  };
  if (std::all_of(all.begin(), all.end(), finite)) {
    return;
  }
  for (const std::string& name : model.checkpoint().tensor_names()) {
    model.checkpoint().require_finite(name);
  }
  fail_input({model.checkpoint().path(), "",
              "the input of layer " + std::to_string(layer_idx) + "'s attention is NaN or infinite",
              "finite numbers", "others", "the model itself has no finite output for these tokens"});
}

PendingFile write_layer(const WorkFolder& work, Index layer_idx, const LayerMoments& moments) {
  std::vector<std::span<const std::byte>> parts = {std::as_bytes(std::span(&layer_idx, 1))};
  for (const std::span<const double> numbers : numbers_of(moments)) {
    parts.push_back(std::as_bytes(numbers));
  }
  return write_state(layer_file(work, layer_idx), moments.tokens, parts);
}

// Nothing where the file is damaged, or another layer's.
std::optional<LayerMoments> read_layer(const WorkFolder& work, Index layer_idx, const ModelConfig& config,
                                       Index length) {
  LayerMoments out;
  out.second_moment.resize(config.hidden_size, config.hidden_size);
  out.mean.resize(config.hidden_size);
  out.received_moment.resize(config.hidden_size, config.hidden_size);
  out.received_mean.resize(config.hidden_size);
  out.distance_mass.resize(config.num_attention_heads, length);
  out.mass_square.resize(config.num_attention_heads);
  out.score_effect.resize(config.num_attention_heads);
  if (normalises_keys(config)) {
    NormedHeadMoments& heads = out.normed_heads.emplace();
    const Index d = config.gqa->head_dim;
    const Index queries = config.num_attention_heads * d;
    const Index keys = config.gqa->num_key_value_heads * d;
    heads.feature_moment.resize(2 * keys, 2 * keys);
    heads.feature_mean.resize(2 * keys);
    heads.query_moment.resize(queries, d);
    heads.query_mean.resize(queries);
    heads.cross.resize(queries + keys, config.hidden_size);
  }
  Index found_idx = -1;
  std::vector<std::span<std::byte>> parts = {std::as_writable_bytes(std::span(&found_idx, 1))};
  for (const std::span<double> numbers : numbers_of(out)) {
    parts.push_back(std::as_writable_bytes(numbers));
  }
  const std::optional<std::int64_t> tokens = read_state(layer_file(work, layer_idx), parts);
  if (!tokens || found_idx != layer_idx) {
    return std::nullopt;
  }
  out.tokens = *tokens;
  return out;
}

// The store with the layers of an unfinished run, and the stream behind them; how many layers those are.
Index begin_store(const Model& model, const Sequences& sequences, const CalibrationHeader& header,
                  const WorkFolder& work, std::unique_ptr<CalibrationWriter>& writer, Stream& stream) {
  writer = std::make_unique<CalibrationWriter>(work.output(), header, sequences);
  const Index layers =
      work.resumed() ? read_state(work.file(state_name), {writable_bytes_of(stream.hidden())}).value_or(0)
                     : 0;
  for (Index i = 0; i < layers; ++i) {
    const std::optional<LayerMoments> moments = read_layer(work, i, model.config(), sequences.length);
    if (!moments) {
      // A damaged file: everything is computed again.
      writer.reset();
      writer = std::make_unique<CalibrationWriter>(work.output(), header, sequences);
      stream = Stream(model, sequences);
      return 0;
    }
    writer->add_layer(*moments);
  }
  return layers;
}

void write_store(const Model& model, const Sequences& sequences, const LayerProgress& progress, double every,
                 DType compute, WorkFolder& work) {
  const ModelConfig& config = model.config();
  CalibrationHeader header;
  header.source_fingerprint = model.checkpoint().fingerprint();
  header.source_config = model.checkpoint().config().dump();
  header.model_type = config.model_type;
  header.hidden_size = config.hidden_size;
  header.num_hidden_layers = config.num_hidden_layers;
  header.num_attention_heads = config.num_attention_heads;
  if (normalises_keys(config)) {
    header.num_key_value_heads = config.gqa->num_key_value_heads;
    header.head_dim = config.gqa->head_dim;
  }
  header.compute = torch_name(compute);
  std::unique_ptr<CalibrationWriter> writer;
  Stream stream(model, sequences);
  SaveClock clock(every);
  // Layers since the last save: without the stream behind them they are of no use to anyone.
  std::vector<PendingFile> unsaved;
  bool saves = true;
  const Index first = begin_store(model, sequences, header, work, writer, stream);
  for (Index i = first; i < config.num_hidden_layers; ++i) {
    const LayerMoments moments =
        backend().observe(backend().load_layer(model, i, compute), stream, i + 1 == config.num_hidden_layers);
    return_freed_memory();
    require_finite(model, i, moments);
    writer->add_layer(moments);
    progress(i + 1, config.num_hidden_layers);
    if (i + 1 == config.num_hidden_layers) {
      break;
    }
    if (!saves) {
      continue;
    }
    try {
      unsaved.push_back(write_layer(work, i, moments));
      if (clock.due()) {
        clock.save([&] {
          for (PendingFile& file : unsaved) {
            file.commit();
          }
          unsaved.clear();
          write_state(work.file(state_name), i + 1, {bytes_of(stream.hidden())}).commit();
        });
        work.record(layers_entry, i + 1);
      }
    } catch (const Error& error) {
      // No room for what only a run that is interrupted needs: the store may still fit.
      if (error.kind() != ErrorKind::machine) {
        throw;
      }
      unsaved.clear();
      saves = false;
    }
  }
  RunIdentity now;
  add_source_identity(model.folder("calibrated"), now);
  require_unchanged(work.journal().given(), now);
  writer->finish();
}

}  // namespace

void calibrate(const Model& model, const Sequences& sequences, const std::filesystem::path& output,
               const LayerProgress& progress, const SaveOptions& save, DType compute) {
  WorkFolder work(output, OutputKind::file, run_identity(model, sequences, compute), save.resume);
  if (work.resumed() && save.taken_up) {
    save.taken_up();
  }
  work.run([&] {
    if (!work.complete()) {
      write_store(model, sequences, progress, save.every, compute, work);
    }
    work.commit();
  });
}

}  // namespace relatent
