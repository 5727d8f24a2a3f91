// A layer of the trained example model with inputs that it really gets: random weights have no structure to
// lose.
#pragma once

#include <variant>

#include "convert/calibrate/calibrate.h"
#include "convert/compute/backend.h"
#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/products.h"
#include "convert/model/model.h"
#include "examples_path.h"
#include "tests/support/samples.h"

namespace relatent::testing_support {

// x is the first of the sequences; the moments are over all of them.
inline LayerSample trained_layer(Index layer_idx, Index length = 128, Index count = 6) {
  const Model model = Model::open(RELATENT_EXAMPLES "/llama-3m");
  const Sequences sequences =
      read_sequences(RELATENT_EXAMPLES "/tokens/calibration.npy", length, count, model.config().vocab_size);
  Stream stream(model, sequences);
  for (Index i = 0; i < layer_idx; ++i) {
    run_layer(model.layer(i), stream);
  }
  LayerSample out;
  out.attention = std::get<GqaAttention>(model.attention(layer_idx));
  out.maps = maps_of(out.attention);
  const MatrixF x = normed(model.input_norm(layer_idx), stream.hidden());
  const MatrixD columns = with_ones(x);
  out.moments.second = columns * columns.transpose() / static_cast<double>(x.rows());
  out.x = x.topRows(length);
  AttentionSums sums(out.attention.heads, length);
  attention_forward(out.attention, out.x, RotaryTable(out.attention.rotary, length), &sums);
  out.moments.distance_mass =
      sums.distance_mass.array().colwise() / sums.distance_mass.rowwise().sum().array();
  return out;
}

}  // namespace relatent::testing_support
