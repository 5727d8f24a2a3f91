// What a conversion is asked for.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "convert/engines/engine.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/partition.h"
#include "convert/latent/published_slices.h"
#include "convert/latent/transmla.h"
#include "formats/resume.h"
#include "linalg/dtype.h"

namespace relatent {

enum class Method { lossless, transmla, relatent, weights_only };
std::string_view method_name(Method method);

// The method that converts: the one that is named, else relatent, which without a calibration becomes
// weights-only.
constexpr Method chosen_method(std::optional<Method> named, bool calibrated) {
  const Method wanted = named.value_or(Method::relatent);
  return wanted == Method::relatent && !calibrated ? Method::weights_only : wanted;
}

// Of the methods relatent and weights-only.
struct RelatentOptions {
  Index rank = 0;                    // of all groups together; a multiple of the groups
  Index rope_dim = 0;                // even, 2 ... K d; at most d for a plain list
  bool expected_rotation = true;     // false: a dropped rotation is replaced by 1
  bool output_metric = true;         // false: the latent is a PCA of balanced keys and values
  bool plain_list = false;           // frequencies as an engine with a geometric list can hold them
  bool layer_lists = false;          // each layer has frequencies of its own
  std::optional<Index> list_stride;  // of a plain list: every how many-th frequency it holds; none = the best
  // For engines that normalise the latent and know no biases: so many extra latent coordinates steady the
  // norm. Needs tokens.
  std::optional<Index> norm_coordinates;
  std::optional<Index> pad_rank;  // instead: as many as bring the latent to this size
  bool query_bias = false;        // the written form has room for a query bias
  // Of a source with norms on queries and keys: the written form has a place for what its latents read;
  // false: they read a linear stand-in (maps.h).
  bool normed_heads = false;
  std::optional<Index> q_rank;  // the query is compressed to a latent of this size, without a norm
  // Shared key, split value, and GLA's groups of heads.
  Partition partition;
  Index key_rank = 0;         // coordinates that the parts of a group share; with several parts only
  double value_weight = 0.1;  // joint_latent.h
  // Other than shared: TPLA as published, one latent turned and sliced; of the fits only that of o_proj
  // applies.
  LatentOrder order = LatentOrder::shared;
  FitOptions fit;
  LayerSet carried;  // layers that are not converted
  // bf16: the fits' large products and the streams' MLPs are formed in bfloat16. Needs Backend::has_bf16.
  DType compute = DType::f32;

  bool uses_tokens() const { return fit.queries || fit.keys || fit.refit || norm_coordinates; }
};

struct ConvertOptions {
  std::filesystem::path source;
  std::filesystem::path output;
  std::optional<Index> context;  // the length that the source is for (Model::open)
  Method method = chosen_method({}, false);
  std::string form = "mla";       // of forms(); "auto": the one that devices lose least with (form_choice.h)
  std::optional<Index> devices;   // with auto: that split the latents, one each
  std::optional<Index> branches;  // latents of a partitioned form
  std::optional<Index> key_rank;  // shared key, split value: coordinates that the parts of a group share
  // Layers to convert, as LayerSet::parse reads them; the others stay grouped-query attention. Empty = those
  // that see every position.
  std::string layers;
  std::optional<std::filesystem::path> calibration;
  // Size of all distinct latent coordinates together, and of the rotary key. A budget is (rank + rope_dim) /
  // (2 K d), rounded down to whole numbers.
  std::optional<Index> rank;
  std::optional<Index> rope_dim;
  std::optional<double> kv_budget;
  bool one_list = false;  // layers share their rotary frequencies where they need not
  // The latent as it is stored and the rotary key, as an engine's kernels want them; --to mla only.
  // Coordinates that the rank leaves over hold nothing (or steady the norm, where the engine normalises).
  // Rank none = as large as fits.
  std::optional<CacheShape> shape;
  // Instead: elements per token and layer that each of partition.latents() devices caches.
  std::optional<Index> per_device;
  // relatent only: the smallest cache that loses at most so many nats on held-out calibration tokens.
  std::optional<double> max_nats;
  // transmla only.
  std::optional<Index> fold;  // none = try them and keep the best
  double balance = 1;
  std::optional<Index> q_rank;
  // relatent only; its sizes are filled in from the plan, and what it computes in from here: none = as the
  // calibration was, where this processor can.
  RelatentOptions relatent;
  std::optional<DType> compute;
  // Engines that normalise the latent: extra coordinates that steady the norm, or the rank to pad to.
  std::optional<Index> norm_coordinates;
  std::optional<Index> pad_rank;
  std::string engine = "transformers";
  // Engines that write a single file: llama.cpp's name for how the tokenizer cuts text, "no_vocab" to leave
  // the tokenizer out; empty = found from tokenizer.json.
  std::string pre_tokenizer;
  std::optional<DType> dtype;  // none = as the source
  // Calibration sequences that the fits leave alone, on which the result is measured; none = a few of many.
  std::optional<Index> held_out;
  std::uint64_t max_shard_bytes = 5'000'000'000;
  // How the run is interrupted and continued, which decides nothing of the result.
  SaveOptions save;
};

}  // namespace relatent
