// What a conversion will do, decided from options, config and headers before any weight is read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "convert/latent/lossless.h"
#include "convert/plan/inputs.h"
#include "convert/plan/options.h"
#include "convert/plan/size_candidates.h"

namespace relatent {

// Sizes that were tried and the nats they lost on held-out sequences.
struct SizeTrial : CacheSizes {
  double nats = 0;
};

// Sizes that are left to trials.
struct OpenSizes {
  std::vector<CacheSizes> candidates;  // one of which trials will choose
  bool all_tried = false;              // else as many as the search takes
  bool weights_add_one = false;        // a further one, which the weights decide
  Index step = size_step;              // from one to the next, where not all are tried
};

enum class TensorAction {
  convert,  // computed
  copy,     // byte for byte
  cast,     // the same numbers in another dtype
};

struct PlannedTensor {
  TensorSpec spec;
  Role role;
  std::optional<Index> layer_idx{};  // none outside the layers
  std::optional<Index> part{};       // which latent or expert, of roles that have several
  TensorAction action = TensorAction::copy;
  std::string source;  // name in the source, of what is copied or cast
};

// Everything that config, index and headers decide.
struct ConvertPlan {
  ConvertOptions options;  // as given, with the sizes that they left open
  LatentShape shape;
  std::optional<LosslessSizes> lossless;  // of --method lossless, what its layers take, of GQA
  std::vector<SizeTrial> trials;          // what the sizes were chosen from, where they were
  std::optional<OpenSizes> open;  // of a dry run: what they are to be chosen from; the plan is of one of them
  std::vector<std::string> warnings;
  std::vector<PlannedTensor> tensors;  // in the order in which they are written
  std::vector<std::string> left_out;   // source tensors that have no place in the output, with the reason
  std::vector<std::filesystem::path> side_files;  // copied as they are
  DType dtype = DType::f32;                       // of converted tensors and of the config
  LayerSet carried;                               // layers that are not converted
  Index source_cache_elements = 0;                // per token and converted layer
  Index converted_cache_elements = 0;
  std::uint64_t source_cache_bytes = 0;  // per token, all layers together, as long as no window is full
  std::uint64_t converted_cache_bytes = 0;
  CacheByContext source_context_bytes{};  // of one sequence
  CacheByContext converted_context_bytes{};
  std::uint64_t output_bytes = 0;  // of tensors and side files
  std::uint64_t resume_bytes = 0;  // of disk beside it, while the conversion runs
  std::uint64_t layer_bytes = 0;   // of one layer in flight
  std::uint64_t memory_bytes = 0;  // estimate of the peak beyond mapped file pages
};

// The options with what the fits' large products are formed in: as the calibration was made where nothing is
// said. Throws Error (usage) when this processor cannot.
ConvertOptions with_compute_type(const ConvertOptions& options, const ConvertInputs& inputs);

// The same and what inputs and engine decide of what they leave open. Throws Error (usage, input) when
// options contradict each other, or hold something that the target has no place for (by name).
ConvertOptions completed(const ConvertOptions& options, const ConvertInputs& inputs);

// options: completed. Throws Error (usage) as the sizes do not fit.
ConvertPlan make_plan(const ConvertOptions& options, const ConvertInputs& inputs);

// What the methods relatent and weights-only are run with, for layers of that shape.
RelatentOptions relatent_options(const ConvertOptions& options, const ConvertInputs& inputs,
                                 const LatentShape& shape);

}  // namespace relatent
