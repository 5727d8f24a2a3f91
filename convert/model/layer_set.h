// Some of a model's layers.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "linalg/matrix.h"

namespace relatent {

class LayerSet {
 public:
  LayerSet() = default;
  // In any order.
  explicit LayerSet(std::vector<Index> layers);
  // "0-5,8": layers and ranges of them. Throws Error (usage) naming the option when that is none of it, or
  // names a layer that a model of so many layers does not have.
  static LayerSet parse(std::string_view option, const std::string& text, Index layers);

  bool empty() const { return layers_.empty(); }
  bool has(Index layer_idx) const;
  // How many of them come before this layer.
  Index before(Index layer_idx) const;
  // In order.
  const std::vector<Index>& layers() const { return layers_; }
  // The others of a model of so many layers.
  LayerSet others(Index layers) const;
  // "0-5, 8"
  std::string text() const;

 private:
  std::vector<Index> layers_;
};

}  // namespace relatent
