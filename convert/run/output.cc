#include "convert/run/output.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/error.h"
#include "formats/hash.h"

namespace relatent {
namespace {

// Seconds of copying, or of converting layers that do not depend on each other, which may be lost.
constexpr double record_every = 5;

// Entries of the journal.
constexpr const char* copied_entry = "copied";
constexpr const char* layers_entry = "layers";
constexpr const char* checksums_entry = "checksums";
// The file with what later layers depend on, in the work folder.
constexpr const char* state_name = "streams";

// Reciprocals of the input norm's gains bring its output to mean square 1, so that a query which passes a
// norm of its own comes through unchanged.
void pass_query_through_norm(const Model& source, Index layer_idx, DType dtype, LatentAttention& attention) {
  const RowVectorF gain = source.input_norm(layer_idx).gain;
  const Index hidden = gain.size();
  attention.q_down = {MatrixF::Zero(hidden, hidden), {}};
  for (Index i = 0; i < hidden; ++i) {
    // What q_b_proj undoes is the reciprocal as it is stored.
    const float down = rounded(dtype, 1 / gain(i));
    if (!std::isfinite(down) || down == 0 || !std::isfinite(1 / down)) {
      const std::string& name = source.name_of(Role::input_norm, layer_idx);
      fail_input({source.checkpoint().path_of(name), name,
                  "holds a gain without a reciprocal in the output's dtype", "gains that are not 0",
                  std::to_string(gain(i)), "the engine's query always passes a norm"});
    }
    attention.q_down.weight(i, i) = down;
    attention.q.weight.col(i) /= down;
  }
  attention.q_norm = {RowVectorF::Ones(hidden), 1e-6F};
}

// A JSON object of names and checksums.
std::map<std::string, std::string> checksums_from(const std::string& text) {
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  std::map<std::string, std::string> out;
  if (json.is_object()) {
    for (const auto& [name, checksum] : json.items()) {
      if (checksum.is_string()) {
        out.emplace(name, checksum.get<std::string>());
      }
    }
  }
  return out;
}

std::vector<PlacedTensor> places_of(const ConvertPlan& plan) {
  std::vector<PlacedTensor> out;
  for (const PlannedTensor& tensor : plan.tensors) {
    out.push_back({tensor.spec.name, tensor.role, tensor.layer_idx, tensor.part});
  }
  return out;
}

}  // namespace

ConvertedOutput::ConvertedOutput(const ConvertPlan& plan, const ConvertInputs& inputs,
                                 const std::vector<Rotary>& rotaries, WorkFolder& work)
    : plan_(plan),
      inputs_(inputs),
      work_(work),
      names_(places_of(plan)),
      copy_clock_(std::min(record_every, plan.options.save.every)),
      layer_clock_(std::min(record_every, plan.options.save.every)),
      state_clock_(plan.options.save.every) {
  open_writer(rotaries);
}

std::filesystem::path ConvertedOutput::state_file() const {
  return work_.file(state_name);
}

void ConvertedOutput::open_writer(const std::vector<Rotary>& rotaries) {
  const Model& source = inputs_.source;
  const Engine& engine = *inputs_.engine;
  OutputPlan output{work_.output(),
                    {},
                    engine.config(source.checkpoint().config(), source.config(), plan_.shape,
                                  rotaries.front(), plan_.dtype),
                    &source.folder("converted"),
                    plan_.side_files,
                    plan_.options.max_shard_bytes,
                    plan_.options.pre_tokenizer};
  if (rotaries.size() > 1) {
    engine.put_layer_rotaries(rotaries, source.config(), plan_.shape, output.config);
  }
  for (const PlannedTensor& tensor : plan_.tensors) {
    output.tensors.push_back(tensor.spec);
  }
  tensors_done_ = work_.journal().last_number(copied_entry);
  layers_done_ = work_.journal().last_number(layers_entry);
  if (tensors_done_ > 0 || layers_done_ > 0) {
    for (const auto& [name, value] : work_.journal().entries()) {
      if (name == checksums_entry) {
        for (const auto& [tensor, checksum] : checksums_from(value)) {
          recorded_[tensor] = checksum;
        }
      }
    }
    writer_ = engine.open_output(output, true);
    if (writer_ && is_as_written()) {
      return;
    }
    // The weights are not what the journal speaks of.
    writer_.reset();
    recorded_.clear();
    work_.record(copied_entry, Index{0});
    work_.record(layers_entry, Index{0});
  }
  tensors_done_ = 0;
  layers_done_ = 0;
  if (std::filesystem::is_directory(work_.output())) {
    for (const auto& entry : std::filesystem::directory_iterator(work_.output())) {
      std::filesystem::remove_all(entry.path());
    }
  }
  std::error_code none;
  std::filesystem::remove(state_file(), none);
  flush_folder(state_file().parent_path());
  writer_ = engine.open_output(output, false);
}

std::vector<const PlannedTensor*> ConvertedOutput::done(Index copied, Index layers) const {
  std::vector<const PlannedTensor*> out;
  for (const PlannedTensor& tensor : plan_.tensors) {
    if (tensor.action == TensorAction::convert ? *tensor.layer_idx < layers : copied-- > 0) {
      out.push_back(&tensor);
    }
  }
  return out;
}

bool ConvertedOutput::is_as_written() const {
  const Checkpoint& source = inputs_.source.folder("converted");
  const std::vector<const PlannedTensor*> tensors = done(tensors_done_, layers_done_);
  return std::all_of(tensors.begin(), tensors.end(), [&](const PlannedTensor* tensor) {
    if (tensor->action == TensorAction::copy) {
      const std::string found = writer_->stored_checksum(tensor->spec.name);
      const std::string wanted = checksum_of(source.bytes(tensor->source));
      source.release(tensor->source);
      return found == wanted;
    }
    return is_as_recorded(*tensor);
  });
}

bool ConvertedOutput::is_as_recorded(const PlannedTensor& tensor) const {
  const auto wanted = recorded_.find(tensor.spec.name);
  return wanted != recorded_.end() && writer_->stored_checksum(tensor.spec.name) == wanted->second;
}

bool ConvertedOutput::has_layers(Index count) const {
  const std::vector<const PlannedTensor*> tensors = done(0, count);
  return std::all_of(tensors.begin(), tensors.end(), [&](const PlannedTensor* tensor) {
    return *tensor->layer_idx < layers_done_ || is_as_recorded(*tensor);
  });
}

std::map<std::string, std::string> ConvertedOutput::checksums() const {
  std::map<std::string, std::string> out;
  for (const PlannedTensor& tensor : plan_.tensors) {
    if (tensor.action == TensorAction::copy) {
      continue;
    }
    std::string checksum = writer_->checksum(tensor.spec.name);
    if (checksum.empty()) {
      const auto recorded = recorded_.find(tensor.spec.name);
      checksum = recorded != recorded_.end() ? recorded->second : "";
    }
    if (!checksum.empty()) {
      out.emplace(tensor.spec.name, std::move(checksum));
    }
  }
  return out;
}

void ConvertedOutput::copy_tensors() {
  const Checkpoint& source = inputs_.source.folder("converted");
  Index count = 0;
  for (const PlannedTensor& tensor : plan_.tensors) {
    if (tensor.action == TensorAction::convert) {
      continue;
    }
    ++count;
    if (count <= tensors_done_) {
      writer_->mark_written(tensor.spec.name);
      continue;
    }
    if (tensor.action == TensorAction::copy) {
      source.require_finite(tensor.source);
      writer_->copy(tensor.spec.name, source, tensor.source);
    } else {
      const MatrixF values = source.read_matrix(tensor.source);
      writer_->write_floats(tensor.spec.name, {values.data(), static_cast<std::size_t>(values.size())});
      source.release(tensor.source);
    }
    if (copy_clock_.due()) {
      make_durable(copy_clock_, {}, copied_entry, count);
    }
  }
}

void ConvertedOutput::keep_layers(Index count) {
  for (const PlannedTensor* tensor : done(0, count)) {
    writer_->mark_written(tensor->spec.name);
  }
}

void ConvertedOutput::write_layer(Index layer_idx, const LatentAttention& attention) {
  const Engine& engine = *inputs_.engine;
  const LayerWriter writer(names_, layer_idx, *writer_);
  if (engine.traits().normed_query) {
    LatentAttention passed = attention;
    pass_query_through_norm(inputs_.source, layer_idx, plan_.dtype, passed);
    engine.write_attention(passed, plan_.shape, plan_.dtype, writer);
  } else {
    engine.write_attention(attention, plan_.shape, plan_.dtype, writer);
  }
}

void ConvertedOutput::save(Index layers, const WriteState& write_state) {
  SaveClock& clock = write_state ? state_clock_ : layer_clock_;
  if (clock.due()) {
    make_durable(clock, write_state, layers_entry, layers);
  }
}

void ConvertedOutput::make_durable(SaveClock& clock, const WriteState& write_state, const char* entry,
                                   Index value) {
  const std::lock_guard lock(saving_);
  clock.save([&] {
    writer_->flush();
    // Before the state, which counts from the moment it is there.
    record_checksums(std::string_view(entry) == layers_entry ? done(0, value) : done(value, 0));
    if (!write_state || state_written(write_state)) {
      work_.record(entry, value);
    }
  });
}

void ConvertedOutput::record_checksums(const std::vector<const PlannedTensor*>& tensors) {
  nlohmann::json added = nlohmann::json::object();
  for (const PlannedTensor* tensor : tensors) {
    const std::string& name = tensor->spec.name;
    if (tensor->action == TensorAction::copy || recorded_.contains(name)) {
      continue;
    }
    if (const std::string checksum = writer_->checksum(name); !checksum.empty()) {
      added[name] = checksum;
      recorded_[name] = checksum;
    }
  }
  if (!added.empty()) {
    work_.record(checksums_entry, added.dump());
  }
}

bool ConvertedOutput::state_written(const WriteState& write_state) const {
  try {
    write_state(state_file());
    return true;
  } catch (const Error& error) {
    // No room for the state: the conversion needs it only to go on from here after an interruption.
    if (error.kind() != ErrorKind::machine) {
      throw;
    }
    return false;
  }
}

}  // namespace relatent
