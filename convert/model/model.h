// An opened model: a checkpoint whose every tensor has been given its place, read one layer at a time.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "convert/model/attention.h"
#include "convert/model/config.h"
#include "convert/model/layer_reader.h"
#include "convert/model/mlp.h"
#include "convert/model/placement.h"
#include "formats/checkpoint.h"

namespace relatent {

// The two halves of a layer, each with the norms of its input and of what it adds to the stream, where there
// are such norms.
struct AttentionHalf {
  RmsNorm input_norm;
  Attention attention;
  RmsNorm attention_output_norm{};
};
struct MlpHalf {
  RmsNorm post_attention_norm;
  Mlp mlp;                         // of a layer with experts, the shared ones; empty where there are none
  std::optional<Experts> experts;  // read from the model, which must outlive the layer
  RmsNorm mlp_output_norm{};
};
struct Layer : AttentionHalf, MlpHalf {};

class Model {
 public:
  // A checkpoint folder or a GGUF file. Reads config and headers only. context: the length of the sequences
  // that the model is for, where its rotary frequencies depend on it (with_longrope_list). Throws Error as
  // Checkpoint::open, GgufSource::open, parse_config and place_tensors do.
  static Model open(const std::filesystem::path& path, std::optional<Index> context = {});

  const ModelConfig& config() const { return config_; }
  const TensorSource& checkpoint() const { return *source_; }
  // The checkpoint as the folder that it is. Throws Error (usage) for a single file, of which `purpose`
  // cannot be done: "calibrated", "converted".
  const Checkpoint& folder(const std::string& purpose) const;
  const std::vector<PlacedTensor>& tensors() const { return tensors_; }
  // part: which latent or expert, of roles that have several.
  bool has(Role role, std::optional<Index> layer_idx, std::optional<Index> part = {}) const {
    return names_.has(role, layer_idx, part);
  }
  const std::string& name_of(Role role, std::optional<Index> layer_idx,
                             std::optional<Index> part = {}) const {
    return names_.at(role, layer_idx, part);
  }

  // Weights widened to float32, the checkpoint's pages let go again. Experts are read when they are used.
  Layer layer(Index layer_idx) const { return {attention_half(layer_idx), mlp_half(layer_idx)}; }
  AttentionHalf attention_half(Index layer_idx) const {
    return {input_norm(layer_idx), attention(layer_idx), attention_output_norm(layer_idx)};
  }
  MlpHalf mlp_half(Index layer_idx) const;
  // The same for products in bfloat16: projections are packed (linalg/packed.h) and have no weight that could
  // be read. Needs has_bf16_products().
  Layer packed_layer(Index layer_idx) const;
  MlpHalf packed_mlp_half(Index layer_idx) const;
  Attention attention(Index layer_idx) const;
  // Grouped-query attention without values and output, of which it reads nothing.
  GqaAttention scores(Index layer_idx) const;
  // The same without queries and output.
  GqaAttention keys_and_values(Index layer_idx) const;
  RmsNorm input_norm(Index layer_idx) const { return reader(layer_idx).norm(Role::input_norm); }
  // Of what attention adds to the stream.
  RmsNorm attention_output_norm(Index layer_idx) const {
    return reader(layer_idx).norm(Role::attention_output_norm);
  }
  RmsNorm final_norm() const { return reader({}).norm(Role::final_norm); }
  // Rows of the embedding for these ids, multiplied as the config says: [ids, hidden].
  MatrixF embed(const std::vector<std::int32_t>& ids) const;
  // Rows [first, first + count) of the output head: [count, hidden].
  MatrixF head_rows(Index first, Index count) const;

 private:
  Model(std::unique_ptr<TensorSource> source, ModelConfig config);
  LayerReader reader(std::optional<Index> layer_idx) const { return {*source_, names_, config_, layer_idx}; }
  GqaAttention gqa_geometry(Index layer_idx) const;
  LatentAttention latent(Index layer_idx) const;
  Mlp mlp(Index layer_idx) const;
  Experts experts(Index layer_idx, bool packed) const;
  // Work that is left to do on `out`, for parallel_for; it refers to `out`.
  using Work = std::vector<std::function<void()>>;
  template <typename Projections>
  void pack_projections(const Projections& projections, Index layer_idx, Work& work) const;
  void pack_mlp(Index layer_idx, MlpHalf& out, Work& work) const;

  std::unique_ptr<TensorSource> source_;
  ModelConfig config_;
  std::vector<PlacedTensor> tensors_;
  TensorNames names_;
};

}  // namespace relatent
