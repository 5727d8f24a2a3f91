#include "convert/model/head_layout.h"

#include <vector>

namespace relatent {
namespace {

// For every row of a head once it is read, the row of the checkpoint.
std::vector<Index> row_order(const GqaGeometry& geometry) {
  const Index half = geometry.head_dim / 2;
  const Index rotating = geometry.rotary_dim / 2;
  const Index still = half - rotating;
  std::vector<Index> out(static_cast<std::size_t>(geometry.head_dim));
  const auto put = [&](Index pair, Index first, Index second) {
    out[static_cast<std::size_t>(pair)] = first;
    out[static_cast<std::size_t>(pair + half)] = second;
  };
  for (Index i = 0; i < rotating; ++i) {
    geometry.rope_interleave ? put(i, 2 * i, 2 * i + 1) : put(i, i, i + rotating);
  }
  for (Index i = 0; i < still; ++i) {
    put(rotating + i, 2 * rotating + i, 2 * rotating + still + i);
  }
  return out;
}

}  // namespace

void to_halves(const GqaGeometry& geometry, float attention_factor, Linear& linear) {
  const std::vector<Index> order = row_order(geometry);
  const Linear read = linear;
  for (Index row = 0; row < read.weight.rows(); ++row) {
    const Index at = row % geometry.head_dim;
    const Index from = row - at + order[static_cast<std::size_t>(at)];
    const float factor = from - (row - at) < geometry.rotary_dim ? 1.0F : 1 / attention_factor;
    linear.weight.row(row) = read.weight.row(from) * factor;
    if (read.bias.size() > 0) {
      linear.bias(row) = read.bias(from) * factor;
    }
  }
}

}  // namespace relatent
