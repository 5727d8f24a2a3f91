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
      const auto [maps, known] = know(std::get<GqaAttention>(source.attention(i)), i);
      layers.push_back(concentrate(maps, known, dropped(maps, known)));
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

AbsorbedAttention RelatentConversion::absorb_gqa(const Known& known) const {
  const auto& [maps, moments] = known;
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

AbsorbedAttention RelatentConversion::absorb_mla(const LatentAttention& attention,
                                                 const Moments& known) const {
  // Without tokens nothing is known of a query latent but that it is normalised.
  const Index features = attention.q_down.out() > 0 ? attention.q_down.out() + 1 : known.second.rows();
  MatrixD queries = known.second;
  if (attention.q_down.out() > 0) {
    queries = MatrixD::Identity(features, features);
  }
  FromMlaOptions options;
  options.partition = fitted_partition();
  options.rank = options_.rank / options.partition.groups;
  options.key_rank = options_.key_rank;
  options.lambda = options_.lambda;
  options.value_weight = options_.value_weight;
  return from_mla(attention, known.second, queries, options);
}

LatentAttention RelatentConversion::sliced(const Layer& layer, const AbsorbedAttention& absorbed,
                                           const Moments& known) const {
  const auto* mla = std::get_if<LatentAttention>(&layer.attention);
  const Index parts = options_.partition.parts;
  if (mla == nullptr) {
    return slice_latent(to_latent_attention(absorbed, known.second), parts, options_.order, known.second,
                        known.second);
  }
  const Index features = mla->q.weight.cols() + 1;
  const MatrixD queries =
      mla->q_down.out() == 0 ? known.second : MatrixD(MatrixD::Identity(features, features));
  return slice_latent(*mla, parts, options_.order, known.second, queries);
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
  const auto* mla = std::get_if<LatentAttention>(&layer.attention);
  bool query_bias = affine() && options_.query_bias;
  AbsorbedAttention absorbed;
  Moments known;
  if (mla != nullptr) {
    known = moments_(next_);
    absorbed = absorb_mla(*mla, known);
    query_bias = query_bias && mla->q_down.out() == 0;
  } else {
    Known source = know(std::get<GqaAttention>(layer.attention), next_);
    absorbed = absorb_gqa(source);
    query_bias = query_bias || (affine() && source.maps.has_q_bias);
    known = std::move(source.moments);
  }
  ++next_;
  LatentAttention out;
  const auto compress = [&](LatentAttention& attention, const MatrixD& input_moment) {
    if (options_.q_rank) {
      compress_query(attention, input_moment, *options_.q_rank);
    }
  };
  const auto keep_query = [&] {
    if (mla != nullptr && mla->q_down.out() > 0) {
      out.q_down = mla->q_down;
      out.q_norm = mla->q_norm;
    }
  };
  if (options_.order != LatentOrder::shared) {
    out = sliced(layer, absorbed, known);
    if (streams_) {
      streams_->follow_source(layer);
      if (out.o.bias.size() == 0) {
        out.o.bias = RowVectorF::Zero(out.o.out());
      }
      streams_->finish_attention(layer, out, options_.fit.refit, options_.fit.output_ridge);
      if (!last) {
        streams_->finish_layer(layer);
      }
    }
    return out;
  }
  if (!streams_) {
    const Index features = absorbed.query.front().cols();
    out = mla == nullptr || mla->q_down.out() == 0
              ? to_latent_attention(absorbed, known.second)
              : to_latent_attention(absorbed, known.second, MatrixD::Identity(features, features));
    compress(out, known.second);
    keep_query();
    return out;
  }
  {
    const AttentionSample sample =
        streams_->sample_attention(layer, options_.fit.stride, affine(), query_bias);
    const bool one_latent = options_.partition.latents() == 1;
    if (!affine() && one_latent) {
      absorbed.norm = complete_norm(absorbed.latent(), sample.sampled_inputs, sample.input_moment,
                                    *options_.norm_coordinates);
    }
    score_error_ = fit_attention(sample, options_.fit, absorbed);
    out = to_latent_attention(absorbed, sample.input_moment, sample.query_moment);
    if (!affine() && !one_latent) {
      normalise_branches(out, sample.sampled_inputs, sample.input_moment, *options_.norm_coordinates);
    }
    compress(out, sample.input_moment);
  }
  keep_query();
  // A refit may give every layer a bias, whatever the closed forms left.
  if (affine() && out.o.bias.size() == 0) {
    out.o.bias = RowVectorF::Zero(out.o.out());
  }
  streams_->finish_attention(layer, out, options_.fit.refit, options_.fit.output_ridge);
  if (!last) {
    streams_->finish_layer(layer);
  }
  return out;
}

}  // namespace relatent
