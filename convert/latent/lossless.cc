#include "convert/latent/lossless.h"

#include <algorithm>

#include "convert/latent/complex_form.h"
#include "convert/latent/row_basis.h"

namespace relatent {
namespace {

// Pair f of the keys of every group, [K, D + 1].
MatrixC keys_of(const LayerMaps& maps, Index f) {
  MatrixC out(maps.kv_heads, maps.k.cols());
  for (Index g = 0; g < maps.kv_heads; ++g) {
    out.row(g).real() = maps.k.row(g * maps.head_dim + f);
    out.row(g).imag() = maps.k.row(g * maps.head_dim + f + maps.pairs());
  }
  return out;
}

// The coordinates of a head behind the pairs that rotate.
std::vector<Index> still_coordinates(const LayerMaps& maps, Index rotating) {
  std::vector<Index> out;
  for (const Index half : {Index{0}, maps.pairs()}) {
    for (Index f = rotating; f < maps.pairs(); ++f) {
      out.push_back(half + f);
    }
  }
  return out;
}

// Groups of keys that some heads read.
struct KeyRange {
  Index first = 0;
  Index count = 0;
};

KeyRange keys_read(const LayerMaps& maps, Index first_head, Index head_count) {
  const Index first = maps.group_of(first_head);
  return {first, maps.group_of(first_head + head_count - 1) + 1 - first};
}

// Keys that do not rotate, group by group, then values, and what is independent of them.
RowBasis<MatrixD> latent_basis(const LayerMaps& maps, Index rotating, const KeyRange& groups) {
  const std::vector<Index> still = still_coordinates(maps, rotating);
  const auto n = static_cast<Index>(still.size());
  const Index d = maps.head_dim;
  MatrixD rows(groups.count * (n + d), maps.v.cols());
  for (Index g = 0; g < groups.count; ++g) {
    for (Index i = 0; i < n; ++i) {
      rows.row(g * n + i) = maps.k.row((groups.first + g) * d + still[static_cast<std::size_t>(i)]);
    }
  }
  rows.bottomRows(groups.count * d) = maps.v.middleRows(groups.first * d, groups.count * d);
  return row_basis(rows, groups.count * n);
}

}  // namespace

Index LosslessSizes::rope_dim() const {
  Index pairs = 0;
  for (const Index count : components) {
    pairs += count;
  }
  return 2 * pairs;
}

LosslessSizes lossless_sizes(const LayerMaps& maps, Index rotating, const Partition& partition) {
  LosslessSizes out;
  for (Index f = 0; f < rotating; ++f) {
    out.components.push_back(row_basis(keys_of(maps, f)).rank());
  }
  for (Index group = 0; group < partition.groups; ++group) {
    const Index first = partition.first_head(group, maps.heads);
    const RowBasis<MatrixD> basis = latent_basis(
        maps, rotating, keys_read(maps, first, partition.first_head(group + 1, maps.heads) - first));
    out.groups.push_back({basis.first_rank, basis.rank()});
  }
  return out;
}

LosslessSizes larger_of(const LosslessSizes& a, const LosslessSizes& b) {
  LosslessSizes out = a;
  for (std::size_t f = 0; f < out.components.size(); ++f) {
    out.components[f] = std::max(a.components[f], b.components[f]);
  }
  for (std::size_t g = 0; g < out.groups.size(); ++g) {
    const GroupSizes& x = a.groups[g];
    const GroupSizes& y = b.groups[g];
    const Index keys = std::max(x.key_rank, y.key_rank);
    out.groups[g] = {keys, keys + std::max(x.rank - x.key_rank, y.rank - y.key_rank)};
  }
  return out;
}

Rotary lossless_rotary(const Rotary& source, const std::vector<Index>& components) {
  Rotary out;
  out.attention_factor = source.attention_factor;
  const Index most = components.empty() ? 0 : *std::max_element(components.begin(), components.end());
  for (Index c = 0; c < most; ++c) {
    for (std::size_t f = 0; f < components.size(); ++f) {
      if (c < components[f]) {
        out.inv_freq.push_back(source.inv_freq[f]);
      }
    }
  }
  return out;
}

RotaryKey lossless_rotary_key(const LayerMaps& maps, const std::vector<Index>& components) {
  const Index d = maps.head_dim;
  const Index half = maps.pairs();
  const auto rotating = static_cast<Index>(components.size());
  RotaryKey out;
  out.rotary = lossless_rotary(maps.rotary, components);
  const auto pairs = static_cast<Index>(out.rotary.inv_freq.size());
  out.read = MatrixD::Zero(2 * pairs, maps.key_dim());
  MatrixD write = MatrixD::Zero(maps.key_dim(), 2 * pairs);
  for (Index f = 0; f < rotating; ++f) {
    const RowBasis<MatrixC> basis = row_basis(keys_of(maps, f));
    for (Index c = 0; c < basis.rank(); ++c) {
      // Before it in the list: c components of every frequency that has as many, and one more of those before
      // f.
      Index pair = 0;
      for (Index other = 0; other < rotating; ++other) {
        pair += std::min(components[static_cast<std::size_t>(other)], other < f ? c + 1 : c);
      }
      for (Index g = 0; g < maps.kv_heads; ++g) {
        put_complex(out.read, pair, pairs, g * d + f, half, basis.pick(c, g));
        put_complex(write, g * d + f, half, pair, pairs, basis.up(g, c));
      }
    }
  }
  const std::vector<Index> still = still_coordinates(maps, rotating);
  const auto n = static_cast<Index>(still.size());
  // The attention factor multiplies rotated scores once for the query and once for the key.
  MatrixD content = MatrixD::Zero(n, d);
  for (Index i = 0; i < n; ++i) {
    content(i, still[static_cast<std::size_t>(i)]) =
        static_cast<double>(maps.rotary.attention_factor) * maps.rotary.attention_factor;
  }
  out.residual = MatrixD::Zero(0, maps.key_dim());
  for (Index h = 0; h < maps.heads; ++h) {
    out.query.emplace_back(write.middleRows(maps.group_of(h) * d, d).transpose());
    out.content_query.push_back(content);
  }
  return out;
}

RotaryKey lossless_rotary_key(const LayerMaps& maps) {
  return lossless_rotary_key(maps, std::vector<Index>(static_cast<std::size_t>(maps.pairs()), maps.kv_heads));
}

JointLatent lossless_latent(const LayerMaps& maps, Index rotating, Index first_head, Index head_count,
                            const GroupSizes& sizes) {
  const Index d = maps.head_dim;
  const KeyRange groups = keys_read(maps, first_head, head_count);
  const RowBasis<MatrixD> basis = latent_basis(maps, rotating, groups);
  const Index n = 2 * (maps.pairs() - rotating);
  const Index keys = basis.first_rank;
  const Index own = basis.rank() - keys;
  JointLatent out;
  out.first_head = first_head;
  out.head_count = head_count;
  out.first_kv_head = groups.first;
  out.down = MatrixD::Zero(sizes.rank, maps.v.cols());
  out.down.topRows(keys) = basis.basis.topRows(keys);
  out.down.middleRows(sizes.key_rank, own) = basis.basis.bottomRows(own);
  out.key_up = MatrixD::Zero(n > 0 ? groups.count * d : 0, sizes.rank);
  for (Index g = 0; g < groups.count && n > 0; ++g) {
    out.key_up.block(g * d, 0, n, keys) = basis.up.block(g * n, 0, n, keys);
  }
  const auto values = basis.up.bottomRows(groups.count * d);
  out.value_up = MatrixD::Zero(groups.count * d, sizes.rank);
  out.value_up.leftCols(keys) = values.leftCols(keys);
  out.value_up.middleCols(sizes.key_rank, own) = values.rightCols(own);
  out.value_shift = VectorD::Zero(groups.count * d);
  out.key_rank = sizes.key_rank;
  return out;
}

JointLatent lossless_latent(const LayerMaps& maps, Index first_head, Index head_count) {
  const KeyRange groups = keys_read(maps, first_head, head_count);
  const RowBasis<MatrixD> basis = latent_basis(maps, maps.pairs(), groups);
  return lossless_latent(maps, maps.pairs(), first_head, head_count, {basis.first_rank, basis.rank()});
}

JointLatent lossless_latent(const LayerMaps& maps) {
  return lossless_latent(maps, 0, maps.heads);
}

}  // namespace relatent
