// The sizes of latent attention, the same for all layers.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "convert/model/layer_set.h"
#include "linalg/matrix.h"

namespace relatent {

// One latent of the canonical form (attention.h) and the heads that read it.
struct BranchGeometry {
  Index first_head = 0;
  Index head_count = 0;
  Index rank = 0;                 // coordinates of its own
  std::optional<Index> shared{};  // which of shared_ranks are the coordinates that come before them

  // With the shared ones.
  Index whole_rank(const std::vector<Index>& shared_ranks) const {
    return rank + (shared ? shared_ranks[static_cast<std::size_t>(*shared)] : 0);
  }
};

// What a stored latent is divided by before it is expanded.
enum class LatentNorm {
  none,
  branch,      // RMSNorm over each branch's whole latent
  replicated,  // the root mean square of rows that every device holds, the same for all latents
};
// As config.json says it.
std::string_view norm_name(LatentNorm norm);
std::optional<LatentNorm> latent_norm_of(std::string_view name);

// Which numbers a norm on queries and keys takes together, before they are rotated.
enum class QkNorm {
  none,
  head,   // each head's (Qwen3)
  width,  // those of all heads (OLMo 2)
};
// As config.json of the own layout says it.
std::string_view qk_norm_name(QkNorm norm);
std::optional<QkNorm> qk_norm_of(std::string_view name);
// Numbers that such a norm of so many heads multiplies by.
inline Index qk_norm_size(QkNorm norm, Index heads, Index head_dim) {
  return norm == QkNorm::width ? heads * head_dim : head_dim;
}

// The heads of a source whose keys are normalised: what latents read in place of the layer's input
// (NormedHeads, attention.h).
struct NormedHeadSizes {
  Index num_key_value_heads = 0;
  Index head_dim = 0;
  QkNorm norm = QkNorm::head;
  bool bias = false;  // of the three projections

  // Keys, then values.
  Index inputs() const { return 2 * num_key_value_heads * head_dim; }
};

// DeepSeek-V2/V3's MLA is one branch, the partitioned forms have several.
struct LatentSizes {
  std::string form = "mla";          // of forms/
  Index kv_lora_rank = 0;            // all distinct latent coordinates together
  Index qk_nope_head_dim = 0;        // n
  Index qk_rope_head_dim = 0;        // p
  Index v_head_dim = 0;              // w
  std::optional<Index> q_lora_rank;  // of a low-rank query
  bool attention_bias = false;       // any bias, of q, keys, values or o_proj
  std::vector<Index> shared_ranks;
  std::vector<BranchGeometry> branches;
  LatentNorm norm = LatentNorm::none;
  Index norm_rank = 0;  // rows of a replicated norm
  std::optional<NormedHeadSizes> normed_heads{};

  // Elements kept per token and layer: r + p.
  Index cache_elements() const { return kv_lora_rank + qk_rope_head_dim; }
};

// Layers that a conversion leaves as they are, grouped-query attention beside latents.
struct CarriedLayers {
  LayerSet layers;
  bool qkv_bias = false;  // they have biases on queries, keys and values
  bool o_bias = false;    // and on o_proj
};

// What can be said of a converted layer before any weight is read. kv_lora_rank is without what an engine
// adds.
struct LatentShape : LatentSizes {
  Index heads = 0;
  bool has_q_bias = false;
  Index norm_coordinates = 0;      // extra latent coordinates of an engine without biases, each branch
  double residual_multiplier = 1;  // by which the reader multiplies what attention adds to the stream
  // Coordinates of the latent that hold nothing, so that a kernel finds the size it wants; MLA only.
  Index dead_coordinates = 0;
  CarriedLayers carried;
};

}  // namespace relatent
