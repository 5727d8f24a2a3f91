// The conversion that this project is named after: rotation concentrated on few components, what loses its
// rotation joined with the values in one latent, every layer then fitted to the source on the stream that the
// converted layers before it produce. Without tokens to fit on, the closed forms alone.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "convert/forms/tpla.h"
#include "convert/latent/absorbed.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/partition.h"
#include "convert/latent/rotary_key.h"
#include "convert/model/model.h"
#include "convert/sequential.h"

namespace relatent {

struct RelatentOptions {
  Index rank = 0;                    // of all groups together; a multiple of the groups
  Index rope_dim = 0;                // even, 2 ... K d; at most d for a plain list
  double lambda = 1;                 // of joint_latent.h
  bool expected_rotation = true;     // false: a dropped rotation is replaced by 1
  bool output_metric = true;         // false: the latent is a PCA of balanced keys and values
  bool plain_list = false;           // frequencies as an engine with a geometric list can hold them
  std::optional<Index> list_stride;  // of a plain list: every how many-th frequency it holds; none = the best
  // For engines that normalise the latent and know no biases: so many extra latent coordinates steady the
  // norm. Needs tokens.
  std::optional<Index> norm_coordinates;
  std::optional<Index> pad_rank;  // instead: as many as bring the latent to this size
  bool query_bias = false;        // the written form has room for a query bias
  std::optional<Index> q_rank;    // the query is compressed to a latent of this size, without a norm
  // Shared key, split value, and GLA's groups of heads.
  Partition partition;
  Index key_rank = 0;         // coordinates that the parts of a group share; with several parts only
  double value_weight = 0.1;  // joint_latent.h
  // Other than shared: TPLA as published, one latent turned and sliced; of the fits only that of o_proj
  // applies.
  LatentOrder order = LatentOrder::shared;
  FitOptions fit;
  // bf16: the fits' large products and the streams' MLPs are formed in bfloat16. Needs has_bf16_products().
  DType compute = DType::f32;

  bool uses_tokens() const { return fit.queries || fit.keys || fit.refit || norm_coordinates; }
};

class RelatentConversion {
 public:
  // moments gives what is known of a layer's input, for any layer and more than once. sequences are the
  // tokens to fit on; empty for none. Reads every layer's attention once to allocate the rotary components,
  // which all layers share because an engine keeps one list of frequencies.
  RelatentConversion(const Model& source, std::function<Moments(Index)> moments, const Sequences& sequences,
                     const RelatentOptions& options);

  // Converts the next layer, from the first to the last, to branches as latent/partition.h numbers them. A
  // NumericalError names the layer, here and below.
  LatentAttention next();

  // Without tokens no layer depends on another.
  bool independent() const { return !streams_; }
  // Converts any layer when they are independent, on any thread. moments: what is known of its input.
  LatentAttention convert(Index layer_idx, Moments moments) const;

  // Between two layers: keeps what the next one needs of those before it, so that another conversion of the
  // same source, sequences and options can go on there. Throws Error (machine).
  void save(const std::filesystem::path& path) const;
  // Goes on where save() was called, or without streams anywhere up to `layers`; the next layer, 0 when there
  // is nothing to go on from. Before the first layer only. Throws Error (machine).
  Index resume(const std::filesystem::path& path, Index layers);

  // Of a plain list: every how many-th frequency of the source is kept.
  Index list_stride() const { return list_stride_; }
  // Score error of the layer converted last (zeros when queries are not fitted).
  const ScoreError& score_error() const { return score_error_; }
  // Largest over layers: mean square of what folding a bias into its weight misses, in units of the bias.
  double fold_error() const { return fold_error_; }

 private:
  // What is known of a layer before it is converted.
  struct Known {
    Index layer_idx = 0;
    Moments moments;
    std::optional<LayerMaps> maps;  // of a GQA source, without biases where the engine has none
    VectorD query_latent;     // [Q + 1], diagonal second moment of a low-rank query's latent; else empty
    bool query_bias = false;  // fitted queries may have one
    double fold_error = 0;    // of this layer

    // Second moment of what the queries act on.
    MomentRef queries() const { return query_latent.size() > 0 ? MomentRef(query_latent) : moments.input(); }
  };
  LatentAttention convert_next(Index layer_idx);
  LatentAttention convert_alone(Index layer_idx, Moments moments) const;
  Known know(const LatentAttention& attention, Index layer_idx, Moments moments) const;
  Known know(GqaAttention attention, Index layer_idx, Moments moments) const;
  // The closed forms, from either kind of source.
  AbsorbedAttention absorbed(const Attention& attention, const Known& known) const;
  std::vector<JointLatent> latents_of(const LayerMaps& maps, const Moments& moments,
                                      const RotaryKey& key) const;
  RotaryKey key_of(const Known& known) const;
  // What the closed forms make; slices are cut from a single latent.
  Partition fitted_partition() const {
    return options_.order == LatentOrder::shared ? options_.partition : Partition{};
  }
  // The closed forms, as branches of one part each or of several.
  LatentAttention closed(const Attention& attention, const Known& known) const;
  // The closed forms fitted. Moves the source's stream past its attention.
  LatentAttention fitted(const AttentionHalf& layer, Known known);
  // The source, or its closed form, cut into slices.
  LatentAttention sliced(const Attention& attention, const Known& known) const;
  // Refits o_proj and moves the converted stream past the attention.
  void finish(const AttentionHalf& layer, LatentAttention& converted);
  bool affine() const { return !options_.norm_coordinates; }
  DroppedRotation dropped(const LayerMaps& maps, const Moments& moments) const;

  const Model& source_;
  std::function<Moments(Index)> moments_;
  RelatentOptions options_;
  std::vector<Concentration> concentrations_;  // of every layer of a grouped-query source
  std::vector<Index> components_;              // rotary components kept per frequency
  Index list_stride_ = 1;
  std::unique_ptr<TwinStreams> streams_;
  Index next_ = 0;
  ScoreError score_error_;
  double fold_error_ = 0;
};

}  // namespace relatent
