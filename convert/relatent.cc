#include "convert/relatent.h"

#include <Eigen/Dense>
#include <algorithm>
#include <stdexcept>

#include "convert/forms/mla.h"
#include "convert/latent/branch_norms.h"
#include "convert/latent/from_mla.h"
#include "convert/latent/joint_latent.h"
#include "convert/latent/query_rank.h"

namespace relatent {

RelatentConversion::RelatentConversion(const Model& source, std::function<Moments(Index)> moments,
                                       const Sequences& sequences, const RelatentOptions& options)
    : source_(source), moments_(std::move(moments)), options_(options) {
  if (options_.pad_rank) {
    options_.norm_coordinates = std::max<Index>(0, *options_.pad_rank - options_.rank);
  }
  // MLA keeps its own rotary key.
  if (source.config().gqa) {
    std::vector<Concentration> layers;
    for (Index i = 0; i < source.config().num_hidden_layers; ++i) {
      const Known known = know(source.attention(i), i);
      layers.push_back(concentrate(*known.maps, known.moments, dropped(*known.maps, known.moments)));
    }
    if (options.plain_list) {
      PlainList list = allocate_plain(layers, options.rope_dim, options.list_stride);
      components_ = std::move(list.components);
      list_stride_ = list.stride;
    } else {
      components_ = allocate_components(layers, options.rope_dim);
    }
  }
  if (sequences.count > 0 && options.uses_tokens()) {
    const Index tokens = sequences.count * sequences.length;
    const Index unknowns = source.config().hidden_size + 1;
    options_.fit.stride =
        std::clamp<Index>(tokens / (options.fit.queries_per_unknown * unknowns), 1, options.fit.stride);
    streams_ = std::make_unique<TwinStreams>(source, sequences);
  }
}

RelatentConversion::Known RelatentConversion::know(const Attention& attention, Index layer_idx) {
  Known out;
  out.moments = moments_(layer_idx);
  if (const auto* mla = std::get_if<LatentAttention>(&attention)) {
    if (mla->q_down.out() > 0) {
      // Nothing is known of a query latent but that it is normalised.
      const Index features = mla->q_down.out() + 1;
      out.query_latent = MatrixD::Identity(features, features);
    }
    out.query_bias = affine() && options_.query_bias && mla->q_down.out() == 0;
    return out;
  }
  const auto& gqa = std::get<GqaAttention>(attention);
  LayerMaps& maps = out.maps.emplace(maps_of(gqa));
  out.query_bias = affine() && (options_.query_bias || maps.has_q_bias);
  if (!affine()) {
    if (maps.has_q_bias || gqa.k.bias.size() > 0 || gqa.v.bias.size() > 0) {
      fold_error_ = std::max(fold_error_, fold_biases(out.moments, maps));
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

AbsorbedAttention RelatentConversion::absorbed_gqa(const LayerMaps& maps, const Moments& moments) const {
  const DroppedRotation rotation = dropped(maps, moments);
  const RotaryKey key = rotary_key(maps, concentrate(maps, moments, rotation), rotation, components_);
  const Partition partition = fitted_partition();
  std::vector<JointLatent> latents;
  for (Index g = 0; g < partition.groups; ++g) {
    JointLatentOptions latent;
    latent.rank = options_.rank / partition.groups;
    latent.lambda = options_.lambda;
    latent.output_metric = options_.output_metric;
    latent.centred = affine();
    latent.key_rank = partition.parts > 1 ? options_.key_rank : -1;
    latent.value_weight = options_.value_weight;
    latent.first_head = partition.first_head(g, maps.heads);
    latent.head_count = partition.first_head(g + 1, maps.heads) - latent.first_head;
    latents.push_back(joint_latent(maps, moments, key, latent));
  }
  return absorb(maps, key, latents, partition.parts);
}

AbsorbedAttention RelatentConversion::absorbed(const Attention& attention, const Known& known) const {
  if (known.maps) {
    return absorbed_gqa(*known.maps, known.moments);
  }
  FromMlaOptions options;
  options.partition = fitted_partition();
  options.rank = options_.rank / options.partition.groups;
  options.key_rank = options_.key_rank;
  options.lambda = options_.lambda;
  options.value_weight = options_.value_weight;
  return from_mla(std::get<LatentAttention>(attention), known.moments.second, known.queries(), options);
}

LatentAttention RelatentConversion::fitted(const Layer& layer, Known known) {
  AbsorbedAttention attention = absorbed(layer.attention, known);
  known.maps.reset();
  LatentAttention out;
  if (streams_) {
    const AttentionSample sample =
        streams_->sample_attention(layer, options_.fit.stride, affine(), known.query_bias);
    const bool one_latent = options_.partition.latents() == 1;
    if (!affine() && one_latent) {
      attention.norm = complete_norm(attention.latent(), sample.sampled_inputs, sample.input_moment,
                                     *options_.norm_coordinates);
    }
    score_error_ = fit_attention(sample, options_.fit, attention);
    out = to_latent_attention(attention, sample.input_moment, sample.query_moment);
    if (!affine() && !one_latent) {
      normalise_branches(out, sample.sampled_inputs, sample.input_moment, *options_.norm_coordinates);
    }
    known.moments.second = sample.input_moment;
  } else {
    out = to_latent_attention(attention, known.moments.second, known.queries());
  }
  if (options_.q_rank) {
    compress_query(out, known.moments.second, *options_.q_rank);
  }
  const auto* mla = std::get_if<LatentAttention>(&layer.attention);
  if (mla != nullptr && mla->q_down.out() > 0) {
    out.q_down = mla->q_down;
    out.q_norm = mla->q_norm;
  }
  return out;
}

LatentAttention RelatentConversion::sliced(const Layer& layer, const Known& known) const {
  if (streams_) {
    streams_->follow_source(layer);
  }
  const MatrixD& inputs = known.moments.second;
  const auto slice = [&](const LatentAttention& whole) {
    return slice_latent(whole, options_.partition.parts, options_.order, inputs, known.queries());
  };
  if (const auto* mla = std::get_if<LatentAttention>(&layer.attention)) {
    return slice(*mla);
  }
  return slice(to_latent_attention(absorbed(layer.attention, known), inputs));
}

void RelatentConversion::finish(const Layer& layer, LatentAttention& converted) {
  // A refit may give every layer a bias, whatever the closed forms left.
  if (affine() && converted.o.bias.size() == 0) {
    converted.o.bias = RowVectorF::Zero(converted.o.out());
  }
  streams_->finish_attention(layer, converted, options_.fit.refit, options_.fit.output_ridge);
  if (next_ < source_.config().num_hidden_layers) {
    streams_->finish_layer(layer);
  }
}

LatentAttention RelatentConversion::next() {
  if (next_ >= source_.config().num_hidden_layers) {
    throw std::logic_error("RelatentConversion: every layer has been converted");
  }
  Layer layer;
  if (streams_) {
    layer = source_.layer(next_);
  } else {
    layer.attention = source_.attention(next_);
  }
  Known known = know(layer.attention, next_);
  ++next_;
  LatentAttention out =
      options_.order == LatentOrder::shared ? fitted(layer, std::move(known)) : sliced(layer, known);
  if (streams_) {
    finish(layer, out);
  }
  return out;
}

void RelatentConversion::save(const std::filesystem::path& path) const {
  if (streams_) {
    streams_->save(path, next_);
  }
}

Index RelatentConversion::resume(const std::filesystem::path& path, Index layers) {
  next_ = streams_ ? streams_->load(path).value_or(0) : layers;
  return next_;
}

}  // namespace relatent
