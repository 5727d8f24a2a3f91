// An engine is a rule that names tensors: how a canonical latent layer lies on disk for one reader.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "convert/engines/layer_writer.h"
#include "convert/model/attention.h"
#include "convert/model/config.h"
#include "convert/model/latent_sizes.h"
#include "formats/checkpoint.h"

namespace relatent {

// What a token leaves in the cache of an MLA layer, by the sizes that kernels are compiled for.
struct CacheShape {
  Index latent = 0;  // kv_lora_rank as it is stored
  Index rotary = 0;  // qk_rope_head_dim

  Index cache_elements() const { return latent + rotary; }
  bool operator==(const CacheShape&) const = default;
};
// "512+64"
std::string to_string(const CacheShape& shape);
// Those that serving engines have kernels for: vLLM's MLA backends take 576 or 320 numbers, FlashMLA,
// FlashInfer and SGLang 512 + 64, and since Mistral Small 4 256 + 64. Largest first.
inline constexpr std::array<CacheShape, 2> served_shapes = {{{512, 64}, {256, 64}}};

// What an engine's layout can hold.
struct EngineTraits {
  std::vector<std::string_view> forms;  // that it has a layout for; none: any
  std::string_view instead{};           // the engine that writes other forms and sources; empty: none does
  bool any_frequencies = true;          // else base^(-2i/p), pairs in order
  bool layer_frequencies = false;       // each layer may have its own (put_layer_rotaries)
  std::optional<double> fixed_base{};   // of the plain list; none = the config's
  bool query_bias = true;               // has a place for a query bias that the source does not have
  bool normed_latent = false;           // normalises every latent, and the method must fit it to that
  Index own_coordinates = 0;            // of the stored latent, that the layout needs for itself
  bool pads_latent = false;             // MLA: dead coordinates of the latent are harmless
  bool any_cache_shape = false;         // its readers have no kernels of certain sizes
  bool normed_heads = false;            // has a place for what the latents of normalised keys read
  bool linear_stand_in = false;         // else takes linear maps in the place of normalised queries and keys
  bool normed_query = false;            // the query passes a normalised latent as wide as the input
  bool latent_source = true;            // what an MLA source's norm becomes has a place
  bool stores_tied_head = false;        // the head is written where it is the embedding too
  bool must_tie = false;                // the output head is the embedding
  std::optional<double> norm_eps{};     // of the layers' norms; none = the config's
  bool layer_kinds = false;             // holds grouped-query layers beside latent ones
  bool single_file = false;             // the output is a file with its tokenizer inside, not a folder
};

struct ExtraFile {
  std::string name;
  std::string_view text;
};

// A converted checkpoint before its first tensor is written.
struct OutputPlan {
  std::filesystem::path path;       // of the folder, which is there, or of the file
  std::vector<TensorSpec> tensors;  // in the order in which they lie
  nlohmann::ordered_json config;    // what Engine::config gave
  const Checkpoint* source = nullptr;
  std::vector<std::filesystem::path> side_files;  // of the source, to go along
  std::uint64_t max_shard_bytes = 0;
  std::string pre_tokenizer;  // of single files: --pre-tokenizer
};

class Engine {
 public:
  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() = default;

  virtual std::string_view name() const = 0;
  // Of the family (model/families) that reads what it writes. Its rules say what the tensors are called and
  // how large they are.
  virtual std::string_view family() const = 0;
  virtual EngineTraits traits() const = 0;
  // Why the engine's layout cannot hold what the source has around its latents, whatever their sizes: a
  // sentence, empty when it can. Here: everything that plain Llama and DeepSeek models do not have.
  virtual std::string why_not_source(const ModelConfig& source) const;
  // Why the engine's layout cannot hold the shape: a sentence, empty when it can.
  virtual std::string why_not(const ModelConfig& /*source*/, const LatentShape& /*shape*/) const {
    return "";
  }
  // All latent coordinates together of a layout that has one size only. The source is a grouped-query model,
  // here and below.
  virtual std::optional<Index> default_rank(const ModelConfig& /*source*/) const { return std::nullopt; }
  // What the query must be compressed to; none = it need not.
  virtual std::optional<Index> query_rank(const ModelConfig& /*source*/) const { return std::nullopt; }
  // In which dtype a tensor of that shape is stored, when `wanted` is asked for.
  virtual DType stored_dtype(Role /*role*/, const std::vector<std::int64_t>& /*shape*/, DType wanted) const {
    return wanted;
  }
  // What is said of the converted model beside its tensors: config.json. source_config is the source's.
  // Throws Error (input) when the layout has no place for the rotary list.
  virtual nlohmann::ordered_json config(const nlohmann::ordered_json& source_config,
                                        const ModelConfig& source, const LatentShape& shape,
                                        const Rotary& rotary, DType dtype) const = 0;
  // With layer_frequencies: adds to a config the list of every layer of latents, in order. shape, source: as
  // config() had them.
  virtual void put_layer_rotaries(const std::vector<Rotary>& rotaries, const ModelConfig& source,
                                  const LatentShape& shape, nlohmann::ordered_json& config) const;
  // What reads the output takes it for, but for its rotary list, on which no tensor depends.
  ModelConfig written_config(const nlohmann::ordered_json& source_config, const ModelConfig& source,
                             const LatentShape& shape, DType dtype) const;
  // Files that go beside the weights.
  virtual std::vector<ExtraFile> extra_files() const { return {}; }
  // reopen: goes on with what an earlier process left there; nullptr when that is not there, or not of this
  // plan. Throws Error (machine, input).
  virtual std::unique_ptr<TensorSink> open_output(const OutputPlan& plan, bool reopen) const;
  // Writes all attention tensors of a layer. A layer may lack a bias that `shape` has.
  virtual void write_attention(const LatentAttention& attention, const LatentShape& shape, DType dtype,
                               const LayerWriter& out) const = 0;
  // Who runs a checkpoint of its family, one line each, and what refuses it only for its sizes. Empty when it
  // is not in this engine's layout.
  virtual std::vector<std::string> readers(const ModelConfig& /*config*/) const { return {}; }
};

// The engine of that name for a form and a source (none: one that every layout holds), or the one that its
// traits name instead; nullptr when there is no engine of that name, or none for that form. carries: some
// layers stay grouped-query attention. An engine without another instead is returned for what it cannot hold
// too: why_not_source and EngineTraits::layer_kinds say so.
std::unique_ptr<Engine> make_engine(std::string_view name, std::string_view form,
                                    const ModelConfig* source = nullptr, bool carries = false);
// Those for which `has` is true of their traits, all of them without; in the order in which they are listed.
std::vector<std::string> engine_names(bool (*has)(const EngineTraits&) = nullptr);
// Engine::readers of every engine of the config's family.
std::vector<std::string> readers_of(const ModelConfig& config);

}  // namespace relatent
