// One checkpoint from plan to written folder: the only place that knows the whole order.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "convert/calibrate/calibrate.h"
#include "convert/engines/engine.h"
#include "convert/latent/maps.h"
#include "convert/latent/transmla.h"
#include "convert/measure.h"
#include "convert/model/model.h"
#include "convert/relatent.h"
#include "convert/tune.h"
#include "convert/unfinished.h"
#include "formats/work_folder.h"

namespace relatent {

enum class Method { lossless, transmla, relatent, weights_only };
std::string_view method_name(Method method);

struct ConvertOptions {
  std::filesystem::path source;
  std::filesystem::path output;
  Method method = Method::lossless;
  std::string form = "mla";       // mla, gla, tpla or mlra
  std::optional<Index> branches;  // latents of a partitioned form
  std::optional<Index> key_rank;  // shared key, split value: coordinates that the parts of a group share
  std::optional<std::filesystem::path> calibration;
  // Size of all distinct latent coordinates together, and of the rotary key. A budget is (rank + rope_dim) /
  // (2 K d), rounded down to whole numbers.
  std::optional<Index> rank;
  std::optional<Index> rope_dim;
  std::optional<double> kv_budget;
  // The latent as it is stored and the rotary key, as an engine's kernels want them; --to mla only.
  // Coordinates that the rank leaves over hold nothing (or steady the norm, where the engine normalises).
  // Rank none = as large as fits.
  std::optional<CacheShape> shape;
  // Instead: numbers per token and layer that each of partition.latents() devices caches.
  std::optional<Index> per_device;
  // relatent only: the smallest cache that loses at most so many nats on held-out calibration tokens.
  std::optional<double> max_nats;
  // transmla only.
  std::optional<Index> fold;  // none = try them and keep the best
  double balance = 1;
  TransmlaOptions::Columns balance_columns = TransmlaOptions::Columns::head;
  std::optional<Index> q_rank;
  // relatent only; its sizes are filled in from the plan, and what it computes in from here: none = as the
  // calibration was, where this processor can.
  RelatentOptions relatent;
  std::optional<DType> compute;
  // Engines that normalise the latent: extra coordinates that steady the norm, or the rank to pad to.
  std::optional<Index> norm_coordinates;
  std::optional<Index> pad_rank;
  std::string engine = "transformers";
  std::optional<DType> dtype;  // none = as the source
  // Calibration sequences that the fits leave alone, on which the result is measured; none = a few of many.
  std::optional<Index> held_out;
  std::uint64_t max_shard_bytes = 5'000'000'000;
  // How the run is interrupted and continued, which decides nothing of the result.
  SaveOptions save;
};

enum class Fate {
  converted,  // computed
  carried,    // copied byte for byte
  recoded,    // the same numbers in another dtype
};

struct PlannedTensor {
  TensorSpec spec;
  Fate fate = Fate::carried;
  std::string source;  // name in the source, for carried and recoded ones
};

// Everything that config, index and headers decide.
struct ConvertPlan {
  LatentShape shape;
  std::vector<SizeTrial> trials;  // what the sizes were chosen from, where they were
  std::vector<std::string> warnings;
  std::vector<PlannedTensor> tensors;  // in the order in which they are written
  std::vector<std::string> left_out;   // source tensors that have no place in the output, with the reason
  std::vector<std::filesystem::path> side_files;  // carried along untouched
  DType dtype = DType::f32;                       // of converted tensors and of the config
  Index source_cache_numbers = 0;                 // per token and layer
  Index converted_cache_numbers = 0;
  std::uint64_t output_bytes = 0;  // of tensors and side files
  std::uint64_t resume_bytes = 0;  // of disk beside it, while the conversion runs
  std::uint64_t layer_bytes = 0;   // of one layer in flight
  std::uint64_t memory_bytes = 0;  // estimate of the peak beyond mapped file pages
};

struct ConvertReport {
  Index kv_rank = 0;
  Index rope_dim = 0;
  Index branches = 1;
  std::optional<Index> fold;  // transmla: the one used
  // Engines without biases: mean square, in the layer where it is largest, of what the nearest linear map of
  // the input misses of the biases of q, k and v, in units of theirs; 0 without biases.
  double fold_error = 0;
  // What the written checkpoint loses on calibration tokens; none without a calibration.
  std::optional<Measurement> measured;
  std::vector<std::string> warnings;  // beside the plan's: what only the result tells
  double seconds = 0;
  std::uint64_t bytes_read = 0;
  std::uint64_t bytes_written = 0;
};

class Conversion {
 public:
  // Opens the source and plans. Throws Error: usage when options contradict each other or the source's sizes,
  // input when the source is not readable, not a GQA model, or holds something that has no place in the
  // target (by name).
  // watch, when given, hears of every pair of sizes that is tried.
  // claim: the output's work folder is made (or taken up) before sizes are tried rather than by run(), so
  // that a name which is taken is refused at once and trials outlive an interruption. Throws Error as
  // WorkFolder does.
  explicit Conversion(ConvertOptions options, const SizeSearch::Watch& watch = {}, bool claim = false);

  const Model& source() const { return source_; }
  const ConvertPlan& plan() const { return plan_; }
  const ConvertOptions& options() const { return options_; }

  // Converts and writes, once. The output folder appears under its name only when it is complete; on an error
  // nothing is left, except for what --resume can go on from when the machine is to blame. Throws Error:
  // usage when the output exists already or an unfinished run is in the way, input when the calibration
  // belongs to another model or a weight is not finite, machine when writing fails.
  ConvertReport run(const LayerProgress& progress);

 private:
  void make_plan(const SizeSearch::Watch& watch);
  void choose_compute();
  void claim_output();
  // Trials that an interrupted search recorded.
  std::vector<SizeTrial> recorded_trials() const;
  void write_output(const LayerProgress& progress, ConvertReport& report);
  // New shards, or those of the run that is continued; how many carried tensors and layers they hold.
  struct Done {
    Index carried = 0;
    Index layers = 0;
  };
  std::unique_ptr<CheckpointWriter> open_writer(Done& done);
  // Copies and recodes what needs no converting, from the done-th tensor on. saved, called now and then with
  // the number of tensors done, may make them durable.
  void carry(CheckpointWriter& writer, Index done, const std::function<void(Index)>& saved) const;
  // Fills in rank and rotary size where a budget is all that is given.
  void search_sizes(const SizeSearch::Watch& watch);
  void warn_of_few_tokens();
  RelatentOptions relatent_options() const;
  // The calibration's tokens that the fits may use, and how many sequences they leave for measuring.
  Sequences fit_sequences() const;
  Index held_out() const;
  // Measures what was written; then says what was lost.
  void measure_output(ConvertReport& report) const;
  void warn_of_losses(ConvertReport& report) const;
  std::vector<std::string> loss_reasons() const;
  void check_calibration() const;
  Moments moments(Index layer_idx) const;
  // Lossless and transmla; fold as choose_fold says.
  LatentAttention convert_layer(Index layer_idx, const Moments& known, Index fold) const;
  // The fold that all layers share, because the engine keeps one list of frequencies for all of them.
  Index choose_fold() const;
  // Where converted layers go, in order. Nothing of it is called by two threads at once but carry, which runs
  // beside the rest.
  using WriteState = std::function<void(const std::filesystem::path&)>;
  struct Target {
    // The first layer that is not done, before it.
    std::function<void(Index)> begin;
    std::function<void(Index, const LatentAttention&)> write;
    // After each layer but the last with the number of layers done; may make them durable, with what `state`
    // writes to a file that the layers after them depend on.
    std::function<void(Index, const WriteState& state)> save;
    // What is not converted.
    std::function<void()> carry;
  };
  // Convert every layer from the first one that is not done.
  using ConvertLayer = std::function<LatentAttention(Index, Moments)>;
  void convert_independently(const ConvertLayer& convert, Index done, const Target& target) const;
  // Returns the fold error.
  double convert_in_sequence(Index done, const Target& target) const;

  ConvertOptions options_;
  Model source_;
  std::unique_ptr<Engine> engine_;
  std::optional<CalibrationFile> calibration_;
  Partition partition_;
  ConvertPlan plan_;
  Facts facts_;
  std::unique_ptr<WorkFolder> work_;
};

}  // namespace relatent
