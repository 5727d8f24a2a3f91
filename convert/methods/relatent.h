// The conversion that this project is named after: rotation concentrated on few components, what loses its
// rotation joined with the values in one latent, every layer then fitted to the source on the stream that the
// converted layers before it produce. Without tokens to fit on, the closed forms alone.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "convert/latent/absorbed.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/rotary_key.h"
#include "convert/methods/method.h"
#include "convert/methods/twin_streams.h"
#include "convert/model/model.h"
#include "convert/plan/options.h"

namespace relatent {

class RelatentConversion final : public ConversionMethod {
 public:
  // moments gives what is known of a layer's input, for any layer and more than once. sequences are the
  // tokens to fit on; empty for none. Reads the attention of every layer that is converted once to allocate
  // the rotary components, which they share where an engine keeps one list of frequencies.
  RelatentConversion(const Model& source, std::function<Moments(Index)> moments, const Sequences& sequences,
                     const RelatentOptions& options);

  std::vector<Rotary> rotaries() const override;
  // Without tokens no layer depends on another. Branches are numbered as latent/partition.h says.
  bool independent() const override { return !streams_; }
  LatentAttention convert(Index layer_idx, Moments moments) const override;
  std::optional<LatentAttention> next() override;
  void save(const std::filesystem::path& path) const override;
  Index resume(const std::filesystem::path& path, Index layers) override;
  double fold_error() const override { return fold_error_; }

  // Of a plain list: every how many-th frequency of the source is kept.
  Index list_stride() const { return list_stride_; }
  // The rotary key that a plain list is best spent on (worthwhile_frequencies), of a grouped-query source.
  Index worthwhile_rope_dim() const {
    return 2 * worthwhile_frequencies(concentrations_, static_cast<Index>(source_rotary().rotating_pairs()));
  }
  // Score error of the layer converted last (zeros when queries are not fitted).
  const ScoreError& score_error() const { return score_error_; }

 private:
  // What is known of a layer before it is converted.
  struct PreparedLayer {
    Index layer_idx = 0;
    Moments moments;
    std::optional<LayerMaps> maps;  // of a GQA source, without biases where the engine has none
    VectorD query_latent;     // [Q + 1], diagonal second moment of a low-rank query's latent; else empty
    bool query_bias = false;  // fitted queries may have one
    double fold_error = 0;    // of this layer

    // Second moment of what the queries act on.
    QueryMoments queries() const {
      return query_latent.size() > 0 ? QueryMoments(query_latent) : moments.queries();
    }
  };
  LatentAttention convert_next(Index layer_idx);
  // Moves both streams past a layer that is carried.
  void carry(Index layer_idx);
  // Where layers follow that are converted, moves both streams past the layer's MLP.
  void finish_layer(Index layer_idx);
  const Rotary& source_rotary() const { return source_.config().shared_rotary(converted_); }
  LatentAttention convert_alone(Index layer_idx, Moments moments) const;
  PreparedLayer prepare(const LatentAttention& attention, Index layer_idx, Moments moments) const;
  PreparedLayer prepare(GqaAttention attention, Index layer_idx, Moments moments) const;
  // The closed forms, from either kind of source.
  AbsorbedAttention absorbed(const Attention& attention, const PreparedLayer& prepared,
                             double key_weight = 1) const;
  // The same with the key weight (joint_latent.h) whose output is nearest to the source's on the sample.
  AbsorbedAttention best_absorbed(const Attention& attention, const PreparedLayer& prepared,
                                  const AttentionSample& sample) const;
  std::vector<JointLatent> latents_of(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                                      double key_weight = 1) const;
  RotaryKey key_of(const PreparedLayer& prepared) const;
  // place: of the layer among those converted.
  const std::vector<Index>& components_of(Index place) const {
    return components_[components_.size() > 1 ? static_cast<std::size_t>(place) : 0];
  }
  // What the closed forms make; slices are cut from a single latent.
  Partition fitted_partition() const {
    return options_.order == LatentOrder::shared ? options_.partition : Partition{};
  }
  // The closed forms, as branches of one part each or of several.
  LatentAttention closed(const Attention& attention, const PreparedLayer& prepared) const;
  // The closed forms fitted. Moves the source's stream past its attention.
  LatentAttention fitted(const AttentionHalf& layer, PreparedLayer prepared);
  // The source, or its closed form, cut into slices.
  LatentAttention sliced(const Attention& attention, const PreparedLayer& prepared) const;
  // Refits o_proj and moves the converted stream past the attention.
  void finish(const AttentionHalf& layer, LatentAttention& converted);
  bool affine() const { return !options_.norm_coordinates; }
  DroppedRotation dropped(const LayerMaps& maps, const Moments& moments) const;

  const Model& source_;
  std::function<Moments(Index)> moments_;
  RelatentOptions options_;
  LayerSet converted_;
  std::vector<Concentration> concentrations_;  // of every converted layer of a grouped-query source
  // Rotary components kept per frequency: those of all layers, or of each of them.
  std::vector<std::vector<Index>> components_;
  Index list_stride_ = 1;
  std::unique_ptr<TwinStreams> streams_;
  Index next_ = 0;
  ScoreError score_error_;
  double fold_error_ = 0;
};

// That conversion of a plan, fitted on these sequences; empty for the closed forms alone.
std::unique_ptr<ConversionMethod> make_relatent_on(const Sequences& sequences, const ConvertPlan& plan,
                                                   const ConvertInputs& inputs);

}  // namespace relatent
