#include "convert/relatent.h"

#include <Eigen/Dense>
#include <algorithm>
#include <stdexcept>

#include "convert/forms/mla.h"
#include "convert/latent/joint_latent.h"

namespace relatent {
RelatentConversion::RelatentConversion(const Model& source, std::function<Moments(Index)> moments,
                                       const Sequences& sequences, const RelatentOptions& options)
    : source_(source), moments_(std::move(moments)), options_(options) {
  if (options_.pad_rank) {
    options_.norm_coordinates = std::max<Index>(0, *options_.pad_rank - options_.rank);
  }
  std::vector<Concentration> layers;
  for (Index i = 0; i < source.config().num_hidden_layers; ++i) {
    const auto [maps, known] = know(std::get<GqaAttention>(source.attention(i)), i);
    layers.push_back(concentrate(maps, known, dropped(maps, known)));
  }
  if (options.plain_list) {
    PlainList list = allocate_plain(layers, options.rope_dim);
    components_ = std::move(list.components);
    list_stride_ = list.stride;
  } else {
    components_ = allocate_components(layers, options.rope_dim);
  }
  if (sequences.count > 0 && options.uses_tokens()) {
    const Index tokens = sequences.count * sequences.length;
    const Index unknowns = source.config().hidden_size + 1;
    options_.fit.stride =
        std::clamp<Index>(tokens / (options.fit.queries_per_unknown * unknowns), 1, options.fit.stride);
    streams_ = std::make_unique<TwinStreams>(source, sequences);
  }
}

RelatentConversion::Known RelatentConversion::know(const GqaAttention& attention, Index layer_idx) {
  Known out{maps_of(attention), moments_(layer_idx)};
  if (options_.norm_coordinates) {
    if (out.maps.has_q_bias || attention.k.bias.size() > 0 || attention.v.bias.size() > 0) {
      fold_error_ = std::max(fold_error_, fold_biases(out.moments, out.maps));
    }
    // x̃ ends in 0 from here on.
    out.moments.second.rightCols<1>().setZero();
    out.moments.second.bottomRows<1>().setZero();
  }
  return out;
}

DroppedRotation RelatentConversion::dropped(const LayerMaps& maps, const Moments& moments) const {
  return options_.expected_rotation ? expected_rotation(maps, moments) : unit_rotation(maps, moments);
}

LatentAttention RelatentConversion::next() {
  const Index layers = source_.config().num_hidden_layers;
  if (next_ >= layers) {
    throw std::logic_error("RelatentConversion: every layer has been converted");
  }
  const bool last = next_ + 1 == layers;
  Layer layer;
  if (streams_) {
    layer = source_.layer(next_);
  } else {
    layer.attention = source_.attention(next_);
  }
  const bool affine = !options_.norm_coordinates;
  const auto [maps, known] = know(std::get<GqaAttention>(layer.attention), next_);
  ++next_;
  const DroppedRotation rotation = dropped(maps, known);
  const RotaryKey key = rotary_key(maps, concentrate(maps, known, rotation), rotation, components_);
  const Partition& partition = options_.partition;
  std::vector<JointLatent> latents;
  for (Index g = 0; g < partition.groups; ++g) {
    JointLatentOptions latent;
    latent.rank = options_.rank / partition.groups;
    latent.lambda = options_.lambda;
    latent.output_metric = options_.output_metric;
    latent.centred = affine;
    latent.key_rank = partition.parts > 1 ? options_.key_rank : -1;
    latent.value_weight = options_.value_weight;
    latent.first_head = partition.first_head(g, maps.heads);
    latent.head_count = partition.first_head(g + 1, maps.heads) - latent.first_head;
    latents.push_back(joint_latent(maps, known, key, latent));
  }
  if (!streams_) {
    return assemble(maps, known, key, latents, std::nullopt);
  }
  AbsorbedAttention absorbed = absorb(maps, key, latents);
  LatentAttention out;
  {
    const AttentionSample sample = streams_->sample_attention(
        layer, options_.fit.stride, affine, affine && (options_.query_bias || maps.has_q_bias));
    if (!affine) {
      absorbed.norm = complete_norm(absorbed.latent(), sample.sampled_inputs, sample.input_moment,
                                    *options_.norm_coordinates);
    }
    score_error_ = fit_attention(sample, options_.fit, absorbed);
    out = to_latent_attention(absorbed, sample.input_moment, sample.query_moment);
  }
  // A refit may give every layer a bias, whatever the closed forms left.
  if (affine && out.o.bias.size() == 0) {
    out.o.bias = RowVectorF::Zero(out.o.out());
  }
  streams_->finish_attention(layer, out, options_.fit.refit, options_.fit.output_ridge);
  if (!last) {
    streams_->finish_layer(layer);
  }
  return out;
}

}  // namespace relatent
