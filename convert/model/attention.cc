#include "convert/model/attention.h"

namespace relatent {
Linear Linear::rows(Index first, Index count) const {
  Linear out;
  out.weight = weight.middleRows(first, count);
  if (bias.size() > 0) {
    out.bias = bias.segment(first, count);
  }
  return out;
}

void Linear::pack() {
  packed = std::make_shared<const PackedWeight>(weight);
  weight.resize(0, 0);
}

Index LatentAttention::total_rank() const {
  Index rank = 0;
  for (const Linear& latent : shared) {
    rank += latent.out();
  }
  for (const LatentBranch& branch : branches) {
    rank += branch.down.out();
  }
  return rank;
}

const Linear& output_projection(const Attention& attention) {
  return std::visit([](const auto& kind) -> const Linear& { return kind.o; }, attention);
}

const Rotary& rotary_of(const Attention& attention) {
  return std::visit([](const auto& kind) -> const Rotary& { return kind.rotary; }, attention);
}

}  // namespace relatent
