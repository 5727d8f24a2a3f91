#include "convert/latent/rotary_key.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "convert/compute/backend.h"
#include "convert/latent/complex_form.h"
#include "linalg/layouts.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

using Complex = std::complex<double>;

// Weights below this part of the largest are raised to it, so that the way back exists.
constexpr double weight_floor = 1e-9;

// γ[h, f] of the header.
MatrixC mean_rotation(const LayerMaps& maps, const Moments& moments) {
  const Index length = moments.distance_mass.cols();
  MatrixC turns(length, maps.pairs());
  for (Index f = 0; f < maps.pairs(); ++f) {
    const auto theta = static_cast<double>(maps.rotary.inv_freq[static_cast<std::size_t>(f)]);
    for (Index delta = 0; delta < length; ++delta) {
      turns(delta, f) = std::polar(1.0, -theta * static_cast<double>(delta));
    }
  }
  MatrixC gamma = moments.distance_mass.cast<Complex>() * turns;
  const VectorD mass = moments.distance_mass.rowwise().sum();
  for (Index h = 0; h < maps.heads; ++h) {
    // A head that sees nothing but the first key has no distance to forget.
    if (mass(h) > 0) {
      gamma.row(h) /= mass(h);
    } else {
      gamma.row(h).setOnes();
    }
  }
  // Exactly, so that nothing is lost of what does not rotate and it never competes for the rotary key.
  for (Index f = 0; f < maps.pairs(); ++f) {
    if (maps.rotary.inv_freq[static_cast<std::size_t>(f)] == 0) {
      gamma.col(f).setOnes();
    }
  }
  return gamma;
}

// κ of the header.
VectorD effect_shares(const LayerMaps& maps, const Moments& moments) {
  const double mean = moments.effects.known() ? moments.effects.score_effect.mean() : 0;
  return mean > 0 ? VectorD(moments.effects.score_effect / mean) : VectorD(VectorD::Ones(maps.heads));
}

// Weights of which none is 0.
VectorD floored(const VectorD& weight) {
  const double largest = weight.maxCoeff();
  return largest > 0 ? VectorD(weight.cwiseMax(weight_floor * largest))
                     : VectorD(VectorD::Ones(weight.size()));
}

}  // namespace

DroppedRotation expected_rotation(const LayerMaps& maps, const Moments& moments) {
  MatrixC gamma = mean_rotation(maps, moments);
  MatrixD loss = (1 - gamma.cwiseAbs2().array()).max(0);
  return {std::move(gamma), std::move(loss)};
}

DroppedRotation unit_rotation(const LayerMaps& maps, const Moments& moments) {
  const MatrixC gamma = mean_rotation(maps, moments);
  return {MatrixC::Ones(gamma.rows(), gamma.cols()), (2 - 2 * gamma.real().array()).max(0)};
}

MatrixD constant_spread(const LayerMaps& maps, const Moments& moments) {
  const MatrixD loss = expected_rotation(maps, moments).loss;
  const Index half = maps.pairs();
  MatrixD sum = MatrixD::Zero(maps.kv_heads, half);
  MatrixD weight = MatrixD::Zero(maps.kv_heads, half);
  for (Index h = 0; h < maps.heads; ++h) {
    const VectorD energy = moments.queries().of(h).energies(maps.query_of(h));
    const Index g = maps.group_of(h);
    for (Index f = 0; f < half; ++f) {
      const double here = energy(f) + energy(f + half);
      sum(g, f) += here * loss(h, f);
      weight(g, f) += here;
    }
  }
  return (weight.array() > 0).select(sum.array() / weight.array().max(1e-300), 0);
}

Concentration concentrate(const LayerMaps& maps, const Moments& moments, const DroppedRotation& dropped) {
  const Stage stage("rotary components");
  const Index half = maps.pairs();
  const Index groups = maps.kv_heads;
  const Index d = maps.head_dim;
  RowsD half_moment(maps.k.rows(), maps.k.cols());
  copy_tiled(moments.input().after(maps.k), half_moment);
  RowsD keys(maps.k.rows(), maps.k.cols());
  copy_tiled(maps.k, keys);
  VectorD query_energy(maps.heads * d);
  const VectorD effect = effect_shares(maps, moments);
  for (Index h = 0; h < maps.heads; ++h) {
    query_energy.segment(h * d, d) = effect(h) * moments.queries().of(h).energies(maps.query_of(h));
  }

  Concentration out;
  for (Index f = 0; f < half; ++f) {
    VectorD weight = VectorD::Zero(groups);
    VectorD read = VectorD::Zero(groups);
    for (Index h = 0; h < maps.heads; ++h) {
      const double energy = query_energy(h * d + f) + query_energy(h * d + f + half);
      read(maps.group_of(h)) += energy;
      weight(maps.group_of(h)) += energy * dropped.loss(h, f);
    }
    const double largest = weight.maxCoeff();
    // Where nothing rotates, components come by how much of them is read.
    weight = floored(largest > 0 ? weight : read);
    const VectorD root = weight.cwiseSqrt();
    // Pair f of every group: real parts, then imaginary parts.
    RowsD left(2 * groups, maps.k.cols());
    RowsD right(2 * groups, maps.k.cols());
    for (Index g = 0; g < groups; ++g) {
      left.row(g) = half_moment.row(g * d + f);
      left.row(groups + g) = half_moment.row(g * d + f + half);
      right.row(g) = keys.row(g * d + f);
      right.row(groups + g) = keys.row(g * d + f + half);
    }
    MatrixD pairs = left * right.transpose();
    pairs = (0.5 * (pairs + pairs.transpose())).eval();
    MatrixC moment(groups, groups);
    for (Index a = 0; a < groups; ++a) {
      for (Index b = 0; b < groups; ++b) {
        moment(a, b) =
            root(a) * root(b) *
            Complex(pairs(a, b) + pairs(groups + a, groups + b), pairs(groups + a, b) - pairs(a, groups + b));
      }
    }
    const Eigenpairs<MatrixC> eigen = backend().hermitian_eigenpairs(moment);
    out.loss.emplace_back(largest > 0 ? VectorD(eigen.values.cwiseMax(0) * (maps.scale * maps.scale))
                                      : VectorD(VectorD::Zero(groups)));
    out.read.emplace_back(eigen.vectors.adjoint() * root.cast<Complex>().asDiagonal());
    out.write.emplace_back(root.cwiseInverse().cast<Complex>().asDiagonal() * eigen.vectors);
  }
  return out;
}

std::vector<Index> allocate_components(const std::vector<Concentration>& layers, Index rope_dim) {
  struct Candidate {
    double loss;
    Index frequency;
  };
  const auto frequencies = static_cast<Index>(layers.front().loss.size());
  const Index groups = layers.front().loss.front().size();
  if (rope_dim % 2 != 0 || rope_dim / 2 > frequencies * groups) {
    throw std::invalid_argument("allocate_components: rope_dim " + std::to_string(rope_dim));
  }
  std::vector<Candidate> candidates;
  for (Index f = 0; f < frequencies; ++f) {
    for (Index c = 0; c < groups; ++c) {
      double loss = 0;
      for (const Concentration& layer : layers) {
        loss += layer.loss[static_cast<std::size_t>(f)](c);
      }
      candidates.push_back({loss, f});
    }
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.loss > b.loss; });
  std::vector<Index> out(static_cast<std::size_t>(frequencies), 0);
  for (Index i = 0; i < rope_dim / 2; ++i) {
    ++out[static_cast<std::size_t>(candidates[static_cast<std::size_t>(i)].frequency)];
  }
  return out;
}

PlainList allocate_plain(const std::vector<Concentration>& layers, Index rope_dim, Index frequencies,
                         std::optional<Index> given) {
  const Index wanted = rope_dim / 2;
  const Index first = given.value_or(1);
  if (rope_dim % 2 != 0 || wanted < 1 || first < 1 || (wanted - 1) * first >= frequencies) {
    throw std::invalid_argument("allocate_plain: rope_dim " + std::to_string(rope_dim) + ", stride " +
                                std::to_string(first));
  }
  // A single frequency is the fastest, whatever the stride.
  const Index last = given || wanted == 1 ? first : (frequencies - 1) / (wanted - 1);
  PlainList best;
  double most = -1;
  for (Index stride = first; stride <= last; ++stride) {
    double kept = 0;
    for (Index i = 0; i < wanted; ++i) {
      for (const Concentration& layer : layers) {
        kept += layer.loss[static_cast<std::size_t>(i * stride)](0);
      }
    }
    if (kept > most) {
      most = kept;
      best.stride = stride;
    }
  }
  best.components.assign(layers.front().loss.size(), 0);
  for (Index i = 0; i < wanted; ++i) {
    best.components[static_cast<std::size_t>(i * best.stride)] = 1;
  }
  return best;
}

Index worthwhile_frequencies(const std::vector<Concentration>& layers, Index frequencies) {
  std::vector<double> first(static_cast<std::size_t>(frequencies));
  std::vector<double> second(first.size());
  for (std::size_t f = 0; f < first.size(); ++f) {
    for (const Concentration& layer : layers) {
      first[f] += layer.loss[f](0);
      second[f] += layer.loss[f].size() > 1 ? layer.loss[f](1) : 0;
    }
  }
  auto middle = second.begin() + static_cast<std::ptrdiff_t>(second.size() / 2);
  std::nth_element(second.begin(), middle, second.end());
  Index out = frequencies;
  while (out > 1 && !(first[static_cast<std::size_t>(out - 1)] > *middle)) {
    --out;
  }
  return out;
}

Rotary kept_rotary(const Rotary& source, const std::vector<Index>& components) {
  Rotary out;
  out.attention_factor = source.attention_factor;
  for (std::size_t f = 0; f < components.size(); ++f) {
    out.inv_freq.insert(out.inv_freq.end(), static_cast<std::size_t>(components[f]), source.inv_freq[f]);
  }
  return out;
}

RotaryKey rotary_key(const LayerMaps& maps, const Concentration& concentration,
                     const DroppedRotation& dropped, const std::vector<Index>& components) {
  const Stage stage("rotary components");
  const Index d = maps.head_dim;
  const Index half = maps.pairs();
  Index pairs = 0;
  for (const Index count : components) {
    pairs += count;
  }
  RotaryKey out;
  out.rotary = kept_rotary(maps.rotary, components);
  out.read = MatrixD::Zero(2 * pairs, maps.key_dim());
  MatrixD write = MatrixD::Zero(maps.key_dim(), 2 * pairs);
  Index pair = 0;
  for (Index f = 0; f < half; ++f) {
    const auto at = static_cast<std::size_t>(f);
    for (Index c = 0; c < components[at]; ++c, ++pair) {
      for (Index g = 0; g < maps.kv_heads; ++g) {
        put_complex(out.read, pair, pairs, g * d + f, half, concentration.read[at](c, g));
        put_complex(write, g * d + f, half, pair, pairs, concentration.write[at](g, c));
      }
    }
  }
  out.residual = MatrixD::Identity(maps.key_dim(), maps.key_dim()) - write * out.read;
  // The attention factor multiplies rotated scores once for the query and once for the key; what is not
  // rotated must carry it itself.
  const double unrotated = static_cast<double>(maps.rotary.attention_factor) * maps.rotary.attention_factor;
  for (Index h = 0; h < maps.heads; ++h) {
    out.query.emplace_back(write.middleRows(maps.group_of(h) * d, d).transpose());
    MatrixD content = MatrixD::Zero(d, d);
    for (Index f = 0; f < half; ++f) {
      put_complex(content, f, half, f, half, unrotated * std::conj(dropped.stand_in(h, f)));
    }
    out.content_query.push_back(std::move(content));
  }
  return out;
}

}  // namespace relatent
