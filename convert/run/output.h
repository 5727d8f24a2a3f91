// The output of a conversion while it grows in its work folder, and what of it outlives an interruption.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "convert/plan/plan.h"
#include "formats/tensor_sink.h"
#include "formats/work_folder.h"

namespace relatent {

// Nothing of it is called by two threads at once but copy_tensors, which runs beside the rest.
class ConvertedOutput {
 public:
  // New weight files, or those of the run that is continued. Plan, inputs and work must outlive it.
  // rotaries: ConversionMethod::rotaries. Throws Error (input) when the engine has no place for them.
  ConvertedOutput(const ConvertPlan& plan, const ConvertInputs& inputs, const std::vector<Rotary>& rotaries,
                  WorkFolder& work);

  // Layers that the run which is continued has written.
  Index layers_done() const { return layers_done_; }
  // Where a method keeps what later layers depend on.
  std::filesystem::path state_file() const;

  // Writes what is not converted.
  void copy_tensors();
  // Whether the first layers, up to `count`, are on the disk as the journal's checksums say. Those up to
  // layers_done() are known to be.
  bool has_layers(Index count) const;
  // The first layers, up to `count`, are there and stay.
  void keep_layers(Index count);
  void write_layer(Index layer_idx, const LatentAttention& attention);
  // After every layer but the last, with the number of layers done: makes them durable when it is time,
  // together with what write_state, where given, writes to state_file().
  using WriteState = std::function<void(const std::filesystem::path&)>;
  void save(Index layers, const WriteState& write_state);
  // Everything is written: adds what goes beside the tensors.
  void finish() { writer_->finish(); }

  std::uint64_t bytes_written() const { return writer_->bytes_written(); }
  // Of every tensor that was converted or cast, by this run or the one that is continued.
  std::map<std::string, std::string> checksums() const;

 private:
  void open_writer(const std::vector<Rotary>& rotaries);
  // The first so many tensors that are copied or cast, and those of the first layers.
  std::vector<const PlannedTensor*> done(Index copied, Index layers) const;
  // Whether what counts as done is on the disk as it was written.
  bool is_as_written() const;
  // Whether a tensor that was converted or cast has the checksum in the journal.
  bool is_as_recorded(const PlannedTensor& tensor) const;
  // Records what is durable from now on. When write_state finds no room nothing counts as done.
  void make_durable(SaveClock& clock, const WriteState& write_state, const char* entry, Index value);
  bool state_written(const WriteState& write_state) const;
  // Puts their checksums into the journal, where it lacks them.
  void record_checksums(const std::vector<const PlannedTensor*>& tensors);

  const ConvertPlan& plan_;
  const ConvertInputs& inputs_;
  WorkFolder& work_;
  TensorNames names_;
  std::unique_ptr<TensorSink> writer_;
  std::map<std::string, std::string> recorded_;  // checksums that the journal has
  Index tensors_done_ = 0;
  Index layers_done_ = 0;
  // Tensors are copied beside the conversion, and one record must be durable before the next is begun.
  std::mutex saving_;
  SaveClock copy_clock_;
  SaveClock layer_clock_;
  SaveClock state_clock_;
};

}  // namespace relatent
