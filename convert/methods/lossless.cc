#include "convert/latent/lossless.h"

#include "convert/latent/assemble.h"
#include "convert/latent/lay_out.h"
#include "convert/methods/method.h"
#include "convert/methods/naming_layer.h"

namespace relatent {
namespace {

class Lossless final : public ConversionMethod {
 public:
  Lossless(const ConvertPlan& plan, const ConvertInputs& inputs) : plan_(plan), inputs_(inputs) {}

  std::vector<Rotary> rotaries() const override {
    const ModelConfig& config = inputs_.source.config();
    if (config.latent) {
      return {config.rotary};
    }
    return {lossless_rotary(converted_rotary(inputs_), plan_.lossless->components)};
  }

  LatentAttention convert(Index layer_idx, Moments moments) const override {
    // MLA in another layout.
    if (inputs_.source.config().latent) {
      return std::get<LatentAttention>(inputs_.source.attention(layer_idx));
    }
    return naming_layer(layer_idx, [&] {
      const LayerMaps maps = maps_of(std::get<GqaAttention>(inputs_.source.attention(layer_idx)));
      const LosslessSizes& sizes = *plan_.lossless;
      const auto rotating = static_cast<Index>(sizes.components.size());
      std::vector<JointLatent> latents;
      for (Index g = 0; g < inputs_.partition.groups; ++g) {
        const Index first = inputs_.partition.first_head(g, maps.heads);
        const Index last = inputs_.partition.first_head(g + 1, maps.heads);
        latents.push_back(
            lossless_latent(maps, rotating, first, last - first, sizes.groups[static_cast<std::size_t>(g)]));
      }
      const RotaryKey key = lossless_rotary_key(maps, sizes.components);
      return split_values(assemble(maps, moments, key, latents, std::nullopt), inputs_.partition,
                          plan_.shape);
    });
  }

 private:
  const ConvertPlan& plan_;
  const ConvertInputs& inputs_;
};

}  // namespace

std::unique_ptr<ConversionMethod> make_lossless(const ConvertPlan& plan, const ConvertInputs& inputs) {
  return std::make_unique<Lossless>(plan, inputs);
}

}  // namespace relatent
