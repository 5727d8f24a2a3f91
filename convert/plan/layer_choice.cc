#include "convert/plan/layer_choice.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "formats/error.h"

namespace relatent {
namespace {

constexpr const char* option = "--layers";

// Layers whose cache grows with the sequence.
LayerSet growing_layers(const Model& source) {
  const ModelConfig& config = source.config();
  LayerSet out = config.sliding_layers().others(config.num_hidden_layers);
  if (out.empty()) {
    fail_input({source.checkpoint().config_path(), "", "sliding_window",
                "a layer that sees every position, whose cache a conversion could make smaller",
                "a window of " + std::to_string(*config.spec(0).window) +
                    " in every layer, below max_position_embeddings = " +
                    std::to_string(config.max_position_embeddings) + ": the cache is bounded already",
                "set max_position_embeddings to the window, within which the two are the same, to convert "
                "nevertheless"});
  }
  return out;
}

void check_layers(const LayerSet& layers, const Model& source) {
  const ModelConfig& config = source.config();
  for (const Index i : layers.layers()) {
    if (config.is_sliding(i)) {
      fail_usage(std::string(option) + " names layer " + std::to_string(i) + ", whose window of " +
                 std::to_string(*config.spec(i).window) +
                 " positions bounds its cache already and which latent engines do not keep: leave it out");
    }
  }
  std::vector<Index> rotating;
  std::copy_if(layers.layers().begin(), layers.layers().end(), std::back_inserter(rotating),
               [&](Index i) { return config.rotates(i); });
  if (rotating.empty()) {
    fail_usage(std::string(option) + " must name one layer at least that rotates queries and keys");
  }
  for (const Index i : rotating) {
    if (config.spec(i).rotary != config.spec(rotating.front()).rotary) {
      fail_usage(std::string(option) + " must name layers of one list of rotary frequencies, and layers " +
                 std::to_string(rotating.front()) + " and " + std::to_string(i) + " have different ones");
    }
  }
}

}  // namespace

LayerSet carried_layers(const std::string& wanted, const Model& source) {
  const Index count = source.config().num_hidden_layers;
  if (source.config().latent) {
    // Of a model of both kinds check_source says that it is none to convert.
    if (!wanted.empty() && !LayerSet::parse(option, wanted, count).others(count).empty()) {
      fail_usage(std::string(option) + " belongs to grouped-query sources: an MLA source is converted whole");
    }
    return {};
  }
  const LayerSet layers = wanted.empty() ? growing_layers(source) : LayerSet::parse(option, wanted, count);
  check_layers(layers, source);
  return layers.others(count);
}

}  // namespace relatent
