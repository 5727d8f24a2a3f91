#include "convert/methods/relatent.h"

#include <algorithm>
#include <numbers>
#include <stdexcept>

#include "convert/compute/backend.h"
#include "convert/latent/assemble.h"
#include "convert/latent/branch_norms.h"
#include "convert/latent/from_mla.h"
#include "convert/latent/joint_latent.h"
#include "convert/latent/query_rank.h"
#include "convert/methods/layer_pipeline.h"
#include "convert/methods/naming_layer.h"
#include "convert/plan/memory.h"

namespace relatent {
namespace {

// How far the key weight may go from 1, in steps of √2: to 8 and to 1/8.
constexpr int most_weight_steps = 6;

// What the closed forms of a layer take, about: its maps in float32 and float64 and what is made of them.
std::uint64_t closed_form_bytes(const ModelConfig& config) {
  const auto hidden = static_cast<std::uint64_t>(config.hidden_size);
  const auto queries = static_cast<std::uint64_t>(config.num_attention_heads * config.gqa->head_dim);
  const auto keys = static_cast<std::uint64_t>(config.gqa->num_key_value_heads * config.gqa->head_dim);
  return hidden * (20 * queries + 12 * (queries + 2 * keys) + 16 * hidden);
}

// A low-rank query stays as the source has it.
void keep_query(const Attention& attention, LatentAttention& converted) {
  const auto* mla = std::get_if<LatentAttention>(&attention);
  if (mla != nullptr && mla->q_down.out() > 0) {
    converted.q_down = mla->q_down;
    converted.q_norm = mla->q_norm;
  }
}

}  // namespace

RelatentConversion::RelatentConversion(const Model& source, std::function<Moments(Index)> moments,
                                       const Sequences& sequences, const RelatentOptions& options)
    : source_(source),
      moments_(std::move(moments)),
      options_(options),
      converted_(options.carried.others(source.config().num_hidden_layers)) {
  if (options_.pad_rank) {
    options_.norm_coordinates = std::max<Index>(0, *options_.pad_rank - options_.rank);
  }
  // MLA keeps its own rotary key.
  if (source.config().gqa) {
    const std::vector<Index>& layers = converted_.layers();
    const auto count = static_cast<Index>(layers.size());
    const auto layer_of = [&](Index i) { return layers[static_cast<std::size_t>(i)]; };
    concentrations_.resize(static_cast<std::size_t>(count));
    std::vector<double> fold_errors(concentrations_.size());
    run_layer_pipeline(0, count, layers_at_once(closed_form_bytes(source.config())),
                       {.moments = [&](Index i) { return moments_(layer_of(i)); },
                        .body =
                            [&](Index i, Moments input) {
                              const auto at = static_cast<std::size_t>(i);
                              const Index layer_idx = layer_of(i);
                              const PreparedLayer prepared =
                                  prepare(source.scores(layer_idx), layer_idx, std::move(input));
                              concentrations_[at] = naming_layer(layer_idx, [&] {
                                return concentrate(*prepared.maps, prepared.moments,
                                                   dropped(*prepared.maps, prepared.moments));
                              });
                              fold_errors[at] = prepared.fold_error;
                            },
                        .finish = [](Index) {}});
    fold_error_ = *std::max_element(fold_errors.begin(), fold_errors.end());
    if (options.plain_list) {
      const auto frequencies = static_cast<Index>(source_rotary().rotating_pairs());
      PlainList list = allocate_plain(concentrations_, options.rope_dim, frequencies, options.list_stride);
      components_ = {std::move(list.components)};
      list_stride_ = list.stride;
    } else if (options.layer_lists) {
      for (const Concentration& layer : concentrations_) {
        components_.push_back(allocate_components({layer}, options.rope_dim));
      }
    } else {
      components_ = {allocate_components(concentrations_, options.rope_dim)};
    }
  }
  if (sequences.count > 0 && options.uses_tokens()) {
    options_.fit.stride =
        options.fit.stride_for(sequences.count * sequences.length, source.config().hidden_size);
    streams_ = std::make_unique<TwinStreams>(source, sequences, options.compute);
  }
}

RelatentConversion::PreparedLayer RelatentConversion::prepare(const LatentAttention& attention,
                                                              Index layer_idx, Moments moments) const {
  PreparedLayer out;
  out.layer_idx = layer_idx;
  out.moments = std::move(moments);
  if (attention.q_down.out() > 0) {
    // Nothing is known of a query latent but that it is normalised.
    out.query_latent = VectorD::Ones(attention.q_down.out() + 1);
  }
  out.query_bias = affine() && options_.query_bias && attention.q_down.out() == 0;
  return out;
}

RelatentConversion::PreparedLayer RelatentConversion::prepare(GqaAttention attention, Index layer_idx,
                                                              Moments moments) const {
  PreparedLayer out;
  out.layer_idx = layer_idx;
  out.moments = std::move(moments);
  if (attention.normed() && !options_.normed_heads) {
    attention = linear_stand_in(std::move(attention), out.moments);
  }
  const bool biased =
      attention.q.bias.size() > 0 || attention.k.bias.size() > 0 || attention.v.bias.size() > 0;
  LayerMaps& maps = out.maps.emplace(maps_of(std::move(attention)));
  out.query_bias = affine() && (options_.query_bias || maps.has_q_bias());
  if (!affine()) {
    if (biased) {
      out.fold_error = fold_biases(out.moments, constant_spread(maps, out.moments), maps);
    }
    // x̃ ends in 0 from here on.
    if (out.moments.diagonal.size() > 0) {
      out.moments.diagonal(out.moments.diagonal.size() - 1) = 0;
    } else {
      out.moments.mean = out.moments.second.rightCols<1>().head(out.moments.second.rows() - 1);
      for (MatrixD* moment : {&out.moments.second, &out.moments.equal}) {
        if (moment->size() > 0) {
          moment->rightCols<1>().setZero();
          moment->bottomRows<1>().setZero();
        }
      }
    }
  }
  return out;
}

DroppedRotation RelatentConversion::dropped(const LayerMaps& maps, const Moments& moments) const {
  return options_.expected_rotation ? expected_rotation(maps, moments) : unit_rotation(maps, moments);
}

RotaryKey RelatentConversion::key_of(const PreparedLayer& prepared) const {
  const Index place = converted_.before(prepared.layer_idx);
  return rotary_key(*prepared.maps, concentrations_[static_cast<std::size_t>(place)],
                    dropped(*prepared.maps, prepared.moments), components_of(place));
}

std::vector<JointLatent> RelatentConversion::latents_of(const LayerMaps& maps, const Moments& moments,
                                                        const RotaryKey& key, double key_weight) const {
  const Partition partition = fitted_partition();
  std::vector<JointLatent> out;
  for (Index g = 0; g < partition.groups; ++g) {
    JointLatentOptions latent;
    latent.rank = options_.rank / partition.groups;
    latent.output_metric = options_.output_metric;
    latent.centred = affine();
    if (partition.parts > 1) {
      latent.key_rank = options_.key_rank;
    }
    latent.value_weight = options_.value_weight;
    latent.key_weight = key_weight;
    latent.first_head = partition.first_head(g, maps.heads);
    latent.head_count = partition.first_head(g + 1, maps.heads) - latent.first_head;
    out.push_back(joint_latent(maps, moments, key, latent));
  }
  return out;
}

AbsorbedAttention RelatentConversion::absorbed(const Attention& attention, const PreparedLayer& prepared,
                                               double key_weight) const {
  if (prepared.maps) {
    const RotaryKey key = key_of(prepared);
    return absorb(*prepared.maps, key, latents_of(*prepared.maps, prepared.moments, key, key_weight),
                  fitted_partition().parts);
  }
  FromMlaOptions options;
  options.partition = fitted_partition();
  options.rank = options_.rank / options.partition.groups;
  options.key_rank = options_.key_rank;
  options.value_weight = options_.value_weight;
  options.key_weight = key_weight;
  return from_mla(std::get<LatentAttention>(attention), prepared.moments.input(), prepared.queries(),
                  prepared.moments.effects, options);
}

AbsorbedAttention RelatentConversion::best_absorbed(const Attention& attention, const PreparedLayer& prepared,
                                                    const AttentionSample& sample) const {
  AbsorbedAttention best = absorbed(attention, prepared);
  // What a norm takes away is not in that output, and there the choice did harm (docs/fidelity.md).
  if (!affine() || !options_.output_metric) {
    return best;
  }
  const auto error_of = [&](const AbsorbedAttention& tried) {
    return least_output_error(sample, options_.fit, affine(), tried);
  };
  double least = error_of(best);
  for (const double step : {std::numbers::sqrt2, 1 / std::numbers::sqrt2}) {
    double weight = 1;
    for (int i = 0; i < most_weight_steps; ++i) {
      AbsorbedAttention next = absorbed(attention, prepared, weight * step);
      const double error = error_of(next);
      if (!(error < least)) {
        break;
      }
      weight *= step;
      least = error;
      best = std::move(next);
    }
    if (weight != 1) {
      break;
    }
  }
  return best;
}

LatentAttention RelatentConversion::closed(const Attention& attention, const PreparedLayer& prepared) const {
  LatentAttention out;
  if (prepared.maps && fitted_partition().parts == 1) {
    // The same as through the absorbed form, whose queries are as wide as the latent.
    const RotaryKey key = key_of(prepared);
    out = assemble(*prepared.maps, prepared.moments, key, latents_of(*prepared.maps, prepared.moments, key),
                   std::nullopt);
  } else {
    out = to_latent_attention(absorbed(attention, prepared), prepared.moments.input(), prepared.queries());
  }
  if (options_.q_rank) {
    compress_query(out, prepared.moments.asking(), *options_.q_rank);
  }
  keep_query(attention, out);
  if (prepared.maps) {
    out.normed_heads = prepared.maps->normed_heads;
  }
  return out;
}

LatentAttention RelatentConversion::fitted(const AttentionHalf& layer, PreparedLayer prepared) {
  const bool query_bias = prepared.query_bias;
  const AttentionSample sample = streams_->sample_attention(layer, {.stride = options_.fit.stride,
                                                                    .affine = affine(),
                                                                    .query_affine = query_bias,
                                                                    .normed_heads = options_.normed_heads});
  AbsorbedAttention attention = best_absorbed(layer.attention, prepared, sample);
  prepared = {};  // the sample has moments of its own
  const bool one_latent = options_.partition.latents() == 1;
  if (!affine() && one_latent) {
    attention.norm = complete_norm(attention.latent(), sample.sampled_inputs, sample.input_moment,
                                   *options_.norm_coordinates);
  }
  score_error_ = fit_attention(sample, options_.fit, attention);
  if (options_.fit.output_rounds > 0) {
    fit_output(sample, options_.fit, affine(), attention);
  }
  LatentAttention out = to_latent_attention(attention, sample.input_moment, asked_moments(sample));
  if (!affine() && !one_latent) {
    normalise_branches(out, sample.sampled_inputs, sample.input_moment, *options_.norm_coordinates);
  }
  if (options_.q_rank) {
    compress_query(out, sample.input_moment, *options_.q_rank);
  }
  keep_query(layer.attention, out);
  if (options_.normed_heads) {
    out.normed_heads = normed_heads_of(std::get<GqaAttention>(layer.attention));
  }
  return out;
}

LatentAttention RelatentConversion::sliced(const Attention& attention, const PreparedLayer& prepared) const {
  const auto slice = [&](const LatentAttention& whole) {
    return slice_latent(whole, options_.partition.parts, options_.order, prepared.moments.input(),
                        prepared.queries());
  };
  if (const auto* mla = std::get_if<LatentAttention>(&attention)) {
    return slice(*mla);
  }
  return slice(closed(attention, prepared));
}

void RelatentConversion::finish(const AttentionHalf& layer, LatentAttention& converted) {
  // A refit may give every layer a bias, whatever the closed forms left.
  if (affine() && converted.o.bias.size() == 0) {
    converted.o.bias = RowVectorF::Zero(converted.o.out());
  }
  streams_->finish_attention(layer, converted, options_.fit.refit, options_.fit.output_ridge);
}

std::vector<Rotary> RelatentConversion::rotaries() const {
  if (!source_.config().gqa) {
    return {source_rotary()};
  }
  std::vector<Rotary> out;
  for (const std::vector<Index>& components : components_) {
    out.push_back(kept_rotary(source_rotary(), components));
  }
  return out;
}

LatentAttention RelatentConversion::convert(Index layer_idx, Moments moments) const {
  if (!independent()) {
    throw std::logic_error("RelatentConversion: the layers depend on each other");
  }
  return naming_layer(layer_idx, [&] { return convert_alone(layer_idx, std::move(moments)); });
}

LatentAttention RelatentConversion::convert_alone(Index layer_idx, Moments moments) const {
  Attention attention = source_.attention(layer_idx);
  // A prepared layer of grouped-query attention includes all of it.
  const PreparedLayer prepared = std::visit(
      [&](auto& kind) { return prepare(std::move(kind), layer_idx, std::move(moments)); }, attention);
  return options_.order == LatentOrder::shared ? closed(attention, prepared) : sliced(attention, prepared);
}

std::optional<LatentAttention> RelatentConversion::next() {
  if (next_ >= source_.config().num_hidden_layers) {
    throw std::logic_error("RelatentConversion: every layer has been converted");
  }
  const Index layer_idx = next_++;
  if (!converted_.has(layer_idx)) {
    carry(layer_idx);
    return std::nullopt;
  }
  if (independent()) {
    return convert(layer_idx, moments_(layer_idx));
  }
  return naming_layer(
      layer_idx, [&] { return convert_next(layer_idx); },
      "--no-query-fit, --no-key-fit and --no-refit leave out the stages of those names");
}

LatentAttention RelatentConversion::convert_next(Index layer_idx) {
  AttentionHalf layer = source_.attention_half(layer_idx);
  PreparedLayer prepared = std::visit(
      [&](const auto& kind) { return prepare(kind, layer_idx, moments_(layer_idx)); }, layer.attention);
  fold_error_ = std::max(fold_error_, prepared.fold_error);
  LatentAttention out;
  if (options_.order == LatentOrder::shared) {
    out = fitted(layer, std::move(prepared));
  } else {
    out = sliced(layer.attention, prepared);
    streams_->follow_source(layer);
  }
  finish(layer, out);
  // The MLP is read once nothing of the attention is held any more but what is written.
  layer.attention = {};
  finish_layer(layer_idx);
  return out;
}

void RelatentConversion::finish_layer(Index layer_idx) {
  if (layer_idx < converted_.layers().back()) {
    streams_->finish_layer(backend().load_mlp(source_, layer_idx, options_.compute));
  }
}

void RelatentConversion::carry(Index layer_idx) {
  if (streams_ && layer_idx < converted_.layers().back()) {
    streams_->carry_attention(source_.attention_half(layer_idx));
    finish_layer(layer_idx);
  }
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

std::unique_ptr<ConversionMethod> make_relatent_on(const Sequences& sequences, const ConvertPlan& plan,
                                                   const ConvertInputs& inputs) {
  return std::make_unique<RelatentConversion>(
      inputs.source, [&inputs](Index layer_idx) { return input_moments(inputs, layer_idx); }, sequences,
      relatent_options(plan.options, inputs, plan.shape));
}

std::unique_ptr<ConversionMethod> make_relatent(const ConvertPlan& plan, const ConvertInputs& inputs) {
  return make_relatent_on(fit_sequences(plan.options, inputs), plan, inputs);
}

}  // namespace relatent
