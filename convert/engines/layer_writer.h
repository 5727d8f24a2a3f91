// Where an engine puts the attention of a layer: tensors by what they are, which the rules of the family that
// reads them name.
#pragma once

#include <cstddef>

#include "convert/model/placement.h"
#include "formats/tensor_sink.h"

namespace relatent {

class LayerWriter {
 public:
  // names and sink must outlive it.
  LayerWriter(const TensorNames& names, Index layer_idx, TensorSink& sink)
      : names_(names), layer_idx_(layer_idx), sink_(sink) {}

  // values: a row-major matrix or a row vector. part: which latent, of roles that have several.
  // std::out_of_range when the config that was written has no such tensor.
  template <typename Values>
  void put(Role role, const Values& values, std::optional<Index> part = {}) const {
    sink_.write_floats(names_.at(role, layer_idx_, part),
                       {values.data(), static_cast<std::size_t>(values.size())});
  }

 private:
  const TensorNames& names_;
  Index layer_idx_;
  TensorSink& sink_;
};

}  // namespace relatent
