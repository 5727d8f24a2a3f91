#include "convert/latent/transmla.h"

#include "convert/compute/backend.h"
#include "convert/latent/assemble.h"
#include "convert/methods/method.h"
#include "convert/methods/naming_layer.h"
#include "formats/state_file.h"

namespace relatent {
namespace {

// Sequences used to compare folds.
constexpr Index fold_sequences = 8;

Moments equal_moments(const ConvertInputs& inputs, Index layer_idx) {
  return with_equal_weights(input_moments(inputs, layer_idx));
}

// The layer with the rotary key of RoRoPE, and nothing lost but rotation: its latent is all keys and values.
LatentAttention partly_rotated(const LayerMaps& maps, const Moments& moments, const RotaryKey& key) {
  const Index keys = maps.key_dim();
  JointLatent all{MatrixD(2 * keys, maps.k.cols()), MatrixD::Zero(keys, 2 * keys),
                  MatrixD::Zero(keys, 2 * keys), VectorD::Zero(keys)};
  all.down << key.residual * maps.k, maps.v;
  all.key_up.leftCols(keys).setIdentity();
  all.value_up.rightCols(keys).setIdentity();
  return assemble_mla(maps, moments, key, all, std::nullopt);
}

// As the authors' code: the rotary key from the calibration, then the latent of every layer from a second
// calibration, of the model whose layers have that key.
class Transmla final : public ConversionMethod {
 public:
  Transmla(const ConvertPlan& plan, const ConvertInputs& inputs, Index fold)
      : plan_(plan),
        inputs_(inputs),
        options_{plan.shape.qk_rope_head_dim, fold, plan.options.balance},
        stream_(inputs.source, inputs.calibration->sequences()) {}

  std::vector<Rotary> rotaries() const override {
    return {transmla_rotary(converted_rotary(inputs_), options_, inputs_.source.config().gqa->head_dim)};
  }

  bool independent() const override { return false; }
  LatentAttention convert(Index /*layer_idx*/, Moments /*moments*/) const override {
    throw std::logic_error("Transmla: the layers depend on each other");
  }

  std::optional<LatentAttention> next() override {
    const Index layer_idx = next_++;
    Layer layer = backend().load_layer(inputs_.source, layer_idx, DType::f32);
    if (inputs_.carried.has(layer_idx)) {
      run_layer(layer, stream_);
      return std::nullopt;
    }
    return naming_layer(layer_idx, [&] {
      const LatentShape& shape = plan_.shape;
      const LayerMaps maps = maps_of(std::get<GqaAttention>(std::move(layer.attention)));
      const Moments first = equal_moments(inputs_, layer_idx);
      const TransmlaKey key = transmla_rotary_key(maps, first, options_);
      layer.attention = partly_rotated(maps, first, key.key);
      const bool last = layer_idx + 1 == inputs_.source.config().num_hidden_layers;
      const LayerMoments observed = backend().observe(layer, stream_, last);
      const Moments moments =
          with_equal_weights(maps.normed_heads ? normed_moments_of(observed) : moments_of(observed));
      std::optional<LowRankQuery> query;
      if (shape.q_lora_rank) {
        query = transmla_query(maps, moments, *shape.q_lora_rank);
      }
      return assemble_mla(maps, moments, key.key,
                          transmla_latent(maps, moments, key, options_, shape.kv_lora_rank), query);
    });
  }

  void save(const std::filesystem::path& path) const override {
    write_state(path, next_, {bytes_of(stream_.hidden())}).commit();
  }
  Index resume(const std::filesystem::path& path, Index /*layers*/) override {
    next_ = read_state(path, {writable_bytes_of(stream_.hidden())}).value_or(0);
    return next_;
  }

 private:
  const ConvertPlan& plan_;
  const ConvertInputs& inputs_;
  TransmlaOptions options_;
  Stream stream_;  // of the model whose layers so far have the rotary key
  Index next_ = 0;
};

}  // namespace

std::unique_ptr<ConversionMethod> make_transmla(const ConvertPlan& plan, const ConvertInputs& inputs,
                                                Index fold) {
  return std::make_unique<Transmla>(plan, inputs, fold);
}

Index choose_fold(const ConvertPlan& plan, const ConvertInputs& inputs) {
  const Model& source = inputs.source;
  const Index d = source.config().gqa->head_dim;
  const Sequences sequences = first_sequences(inputs.calibration->sequences(), fold_sequences);
  Index best = 0;
  double best_nll = 0;
  // Doubling as long as it helps, as the authors search.
  for (Index fold = std::max<Index>(1, d / plan.shape.qk_rope_head_dim); (d / 2) % fold == 0; fold *= 2) {
    Stream stream(source, sequences);
    for (Index i = 0; i < source.config().num_hidden_layers; ++i) {
      Layer layer = backend().load_layer(source, i, DType::f32);
      if (!inputs.carried.has(i)) {
        const LayerMaps maps = maps_of(std::get<GqaAttention>(std::move(layer.attention)));
        const Moments moments = equal_moments(inputs, i);
        layer.attention = partly_rotated(
            maps, moments, transmla_rotary_key(maps, moments, {plan.shape.qk_rope_head_dim, fold}).key);
      }
      run_layer(layer, stream);
    }
    const double nll = backend().compare_logits(source, stream, source, stream, sequences).source_nll;
    if (best != 0 && nll >= best_nll) {
      break;
    }
    best = fold;
    best_nll = nll;
  }
  return best;
}

}  // namespace relatent
