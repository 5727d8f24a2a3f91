// An engine is a rule that names tensors: how a canonical latent layer lies on disk for one reader.
#pragma once

#include <array>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "convert/model/attention.h"
#include "convert/model/config.h"
#include "convert/model/families.h"
#include "convert/model/latent_shape.h"
#include "formats/checkpoint.h"

namespace relatent {

// What a token leaves in the cache of an MLA layer, by the sizes that kernels are compiled for.
struct CacheShape {
  Index latent = 0;  // kv_lora_rank as it is stored
  Index rotary = 0;  // qk_rope_head_dim

  Index numbers() const { return latent + rotary; }
  bool operator==(const CacheShape&) const = default;
};
// "512+64"
std::string to_string(const CacheShape& shape);
// Those that serving engines have kernels for: vLLM's MLA backends take 576 or 320 numbers, FlashMLA,
// FlashInfer and SGLang 512 + 64, and since Mistral Small 4 256 + 64. Largest first.
inline constexpr std::array<CacheShape, 2> served_shapes = {{{512, 64}, {256, 64}}};

// What an engine's layout can hold.
struct EngineTraits {
  bool any_frequencies = true;  // else base^(-2i/p), pairs in order
  bool query_bias = true;       // has a place for a query bias that the source does not have
  bool pads_latent = false;     // MLA: kernels want certain sizes, and dead coordinates are harmless
  Index own_coordinates = 0;    // of the stored latent, that the layout needs for itself
  bool undoes_norm = true;      // writes a latent without a norm so that the engine's norm does nothing
  bool tied_head = true;        // reads tie_word_embeddings
  std::optional<double> fixed_base{};  // of the plain list; none = the config's
  bool normed_query = false;           // the query passes a normalised latent as wide as the input
  bool latent_source = true;           // what an MLA source's norm becomes has a place
  bool must_tie = false;               // the output head is the embedding
  std::optional<double> norm_eps{};    // of the layers' norms; none = the config's
};

struct ExtraFile {
  std::string name;
  std::string_view text;
};

class Engine {
 public:
  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() = default;

  virtual std::string_view name() const = 0;
  virtual EngineTraits traits() const = 0;
  // Why the engine's layout cannot hold the shape: a sentence, empty when it can.
  virtual std::string why_not(const ModelConfig& /*source*/, const LatentShape& /*shape*/) const {
    return "";
  }
  // All latent coordinates together of a layout that has one size only. The source is a grouped-query model,
  // here and below.
  virtual std::optional<Index> default_rank(const ModelConfig& /*source*/) const { return std::nullopt; }
  // What the query must be compressed to; none = it need not.
  virtual std::optional<Index> query_rank(const ModelConfig& /*source*/) const { return std::nullopt; }
  // What a tensor that is carried over is called. name: what the source calls it.
  virtual std::string carried_name(Role /*role*/, Index /*layer_idx*/, const std::string& name) const {
    return name;
  }
  // Numbers per token and layer that the engine caches for this shape.
  virtual Index cache_numbers(const LatentShape& shape) const = 0;
  // The attention tensors of one layer in the order in which they are written.
  virtual std::vector<TensorSpec> attention_tensors(const ModelConfig& source, const LatentShape& shape,
                                                    Index layer_idx, DType dtype) const = 0;
  // config.json of the converted checkpoint. source_config is the source's.
  virtual nlohmann::ordered_json config(const nlohmann::ordered_json& source_config,
                                        const ModelConfig& source, const LatentShape& shape,
                                        const Rotary& rotary, DType dtype) const = 0;
  // Files that go beside the weights.
  virtual std::vector<ExtraFile> extra_files() const { return {}; }
  // Writes all attention tensors of a layer. `shape` says which there are: a layer may lack a bias that
  // others have.
  virtual void write_attention(const LatentAttention& attention, const LatentShape& shape, Index layer_idx,
                               DType dtype, CheckpointWriter& out) const = 0;
};

// The engine of that name for a form; nullptr when there is no engine of that name, or none for that form.
std::unique_ptr<Engine> make_engine(std::string_view name, std::string_view form);
std::string_view known_engines();

}  // namespace relatent
