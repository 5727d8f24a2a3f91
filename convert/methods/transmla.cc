#include "convert/latent/transmla.h"

#include "convert/compute/backend.h"
#include "convert/latent/assemble.h"
#include "convert/methods/method.h"
#include "convert/methods/naming_layer.h"

namespace relatent {
namespace {

// Sequences used to compare folds.
constexpr Index fold_sequences = 8;

class Transmla final : public ConversionMethod {
 public:
  Transmla(const ConvertPlan& plan, const ConvertInputs& inputs, Index fold)
      : plan_(plan),
        inputs_(inputs),
        options_{plan.shape.qk_rope_head_dim, fold, plan.options.balance, plan.options.balance_columns} {}

  Rotary rotary() const override {
    return transmla_rotary(converted_rotary(inputs_), options_, inputs_.source.config().gqa->head_dim);
  }

  LatentAttention convert(Index layer_idx, Moments moments) const override {
    return naming_layer(layer_idx, [&] {
      const LatentShape& shape = plan_.shape;
      const LayerMaps maps = maps_of(std::get<GqaAttention>(inputs_.source.attention(layer_idx)));
      const TransmlaKey key = transmla_rotary_key(maps, moments, options_);
      std::optional<LowRankQuery> query;
      if (shape.q_lora_rank) {
        query = transmla_query(maps, moments, *shape.q_lora_rank);
      }
      return assemble_mla(maps, moments, key.key,
                          transmla_latent(maps, moments, key, options_, shape.kv_lora_rank), query);
    });
  }

 private:
  const ConvertPlan& plan_;
  const ConvertInputs& inputs_;
  TransmlaOptions options_;
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
      Layer converted = backend().load_layer(source, i, DType::f32);
      if (inputs.carried.has(i)) {
        run_layer(converted, stream);
        continue;
      }
      const LayerMaps maps = maps_of(std::get<GqaAttention>(converted.attention));
      const Moments moments = input_moments(inputs, i);
      const RotaryKey key = transmla_rotary_key(maps, moments, {plan.shape.qk_rope_head_dim, fold, 0}).key;
      // Nothing is lost but rotation: the latent is all keys and values.
      const Index keys = maps.key_dim();
      JointLatent all{MatrixD(2 * keys, maps.k.cols()), MatrixD::Zero(keys, 2 * keys),
                      MatrixD::Zero(keys, 2 * keys), VectorD::Zero(keys)};
      all.down << key.residual * maps.k, maps.v;
      all.key_up.leftCols(keys).setIdentity();
      all.value_up.rightCols(keys).setIdentity();
      converted.attention = assemble_mla(maps, moments, key, all, std::nullopt);
      run_layer(converted, stream);
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
