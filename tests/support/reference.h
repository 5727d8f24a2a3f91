// Attention by the book, in double precision and one number at a time.
#pragma once

#include <cmath>
#include <complex>
#include <functional>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/model/attention.h"
#include "linalg/matrix.h"

namespace relatent::testing_support {

// The angle of a pair at a position. It is a float32 in every engine, and a long sequence shows it.
inline double angle_of(const Rotary& rotary, Index position, Index pair) {
  return static_cast<double>(static_cast<float>(position) * rotary.inv_freq[static_cast<std::size_t>(pair)]);
}

// RoPE on one vector by complex multiplication.
inline VectorD rotated(const Rotary& rotary, Index position, const VectorD& x) {
  const Index half = x.size() / 2;
  VectorD out(x.size());
  for (Index j = 0; j < half; ++j) {
    const std::complex<double> turned =
        std::complex<double>(x(j), x(j + half)) *
        std::polar(static_cast<double>(rotary.attention_factor), angle_of(rotary, position, j));
    out(j) = turned.real();
    out(j + half) = turned.imag();
  }
  return out;
}

inline VectorD apply(const Linear& linear, const VectorD& x) {
  VectorD out = VectorD::Zero(linear.weight.rows());
  for (Index i = 0; i < linear.weight.rows(); ++i) {
    for (Index j = 0; j < linear.weight.cols(); ++j) {
      out(i) += static_cast<double>(linear.weight(i, j)) * x(j);
    }
    if (linear.bias.size() > 0) {
      out(i) += static_cast<double>(linear.bias(i));
    }
  }
  return out;
}

inline VectorD apply(const RmsNorm& norm, const VectorD& x) {
  if (!norm.present()) {
    return x;
  }
  const double rms =
      std::sqrt(x.squaredNorm() / static_cast<double>(x.size()) + static_cast<double>(norm.eps));
  return (x / rms).cwiseProduct(norm.gain.transpose().cast<double>());
}

inline VectorD position_of(const MatrixF& x, Index position) {
  return x.row(position).transpose().cast<double>();
}

inline double capped(double score, float softcap) {
  const auto cap = static_cast<double>(softcap);
  return softcap > 0 ? cap * std::tanh(score / cap) : score;
}

// Attention weights of one query over keys from ... position, by their scores.
inline VectorD softmax(const VectorD& scores) {
  VectorD out(scores.size());
  for (Index i = 0; i < scores.size(); ++i) {
    out(i) = std::exp(scores(i) - scores.maxCoeff());
  }
  return out / out.sum();
}

// One head: score(m, n) and value(n) over a sequence; visit, when given, sees every weight.
inline MatrixD attend_by_the_book(Index length, Index window,
                                  const std::function<double(Index, Index)>& score,
                                  const std::function<VectorD(Index)>& value,
                                  const std::function<void(Index, Index, double)>& visit = nullptr) {
  MatrixD out = MatrixD::Zero(length, value(0).size());
  for (Index m = 0; m < length; ++m) {
    const Index first = window > 0 && m >= window ? m - window + 1 : 0;
    VectorD scores(m - first + 1);
    for (Index n = first; n <= m; ++n) {
      scores(n - first) = score(m, n);
    }
    const VectorD weights = softmax(scores);
    for (Index n = first; n <= m; ++n) {
      out.row(m) += weights(n - first) * value(n).transpose();
      if (visit) {
        visit(m, n, weights(n - first));
      }
    }
  }
  return out;
}

// attention_forward of a grouped-query layer; sums, when given, are added to.
inline MatrixD mix_by_the_book(const GqaAttention& a, const MatrixF& x, AttentionSums* sums = nullptr) {
  const Index d = a.head_dim;
  std::vector<VectorD> q;
  std::vector<VectorD> k;
  std::vector<VectorD> v;
  for (Index n = 0; n < x.rows(); ++n) {
    q.push_back(apply(a.q, position_of(x, n)));
    k.push_back(apply(a.k, position_of(x, n)));
    v.push_back(apply(a.v, position_of(x, n)));
    for (Index h = 0; h < a.heads; ++h) {
      q.back().segment(h * d, d) = rotated(a.rotary, n, q.back().segment(h * d, d));
    }
    for (Index g = 0; g < a.kv_heads; ++g) {
      k.back().segment(g * d, d) = rotated(a.rotary, n, k.back().segment(g * d, d));
    }
  }
  const auto at = [](const std::vector<VectorD>& list, Index n) -> const VectorD& {
    return list[static_cast<std::size_t>(n)];
  };
  MatrixD out(x.rows(), a.heads * d);
  for (Index h = 0; h < a.heads; ++h) {
    const Index g = h * a.kv_heads / a.heads;
    MatrixD weights = MatrixD::Zero(x.rows(), x.rows());
    out.middleCols(h * d, d) = attend_by_the_book(
        x.rows(), a.window.value_or(0),
        [&](Index m, Index n) {
          const double score = at(q, m).segment(h * d, d).dot(at(k, n).segment(g * d, d));
          return capped(static_cast<double>(a.scale) * score, a.softcap);
        },
        [&](Index n) -> VectorD { return at(v, n).segment(g * d, d); },
        [&](Index m, Index n, double weight) { weights(m, n) = weight; });
    if (sums == nullptr) {
      continue;
    }
    const MatrixD through = a.o.weight.middleCols(h * d, d).cast<double>();
    sums->received += weights.colwise().sum().transpose();
    sums->mass_square(h) += weights.squaredNorm();
    for (Index m = 0; m < x.rows(); ++m) {
      const VectorD mixed = out.row(m).segment(h * d, d).transpose();
      for (Index n = 0; n <= m; ++n) {
        sums->distance_mass(h, m - n) += n > 0 ? weights(m, n) : 0;
        sums->score_effect(h) +=
            weights(m, n) * weights(m, n) * (through * (at(v, n).segment(g * d, d) - mixed)).squaredNorm();
      }
    }
  }
  return out;
}

// What a branch expands for the input x: [shared; own], normalised.
inline VectorD latent_by_the_book(const LatentAttention& a, const LatentBranch& branch, const VectorD& x) {
  VectorD c = apply(branch.down, x);
  if (branch.shared) {
    const VectorD first = apply(a.shared[static_cast<std::size_t>(*branch.shared)], x);
    VectorD whole(first.size() + c.size());
    whole << first, c;
    c = whole;
  }
  if (branch.norm.present()) {
    c = apply(branch.norm, c);
  }
  if (a.norm_rows.rows() > 0) {
    const VectorD y = a.norm_rows.cast<double>() * x;
    c /= std::sqrt(y.squaredNorm() / static_cast<double>(y.size()) + static_cast<double>(a.norm_eps));
  }
  return c;
}

// attention_forward of a latent layer.
inline MatrixD mix_by_the_book(const LatentAttention& a, const MatrixF& x) {
  const Index n_dim = a.nope_dim;
  const Index p = a.rope_dim;
  const Index w = a.v_dim;
  std::vector<VectorD> q;
  std::vector<VectorD> rotary_key;
  std::vector<std::vector<VectorD>> latent(a.branches.size());
  for (Index n = 0; n < x.rows(); ++n) {
    const VectorD here = position_of(x, n);
    if (a.q_down.out() > 0) {
      const VectorD low = apply(a.q_down, here);
      q.push_back(apply(a.q, a.q_norm.present() ? apply(a.q_norm, low) : low));
    } else {
      q.push_back(apply(a.q, here));
    }
    for (Index h = 0; h < a.heads; ++h) {
      auto rotary_part = q.back().segment(h * (n_dim + p) + n_dim, p);
      rotary_part = rotated(a.rotary, n, rotary_part);
    }
    rotary_key.push_back(rotated(a.rotary, n, apply(a.rotary_key, here)));
    for (std::size_t b = 0; b < a.branches.size(); ++b) {
      latent[b].push_back(latent_by_the_book(a, a.branches[b], here));
    }
  }
  MatrixD out = MatrixD::Zero(x.rows(), a.heads * w);
  for (std::size_t b = 0; b < a.branches.size(); ++b) {
    const LatentBranch& branch = a.branches[b];
    const MatrixD up = branch.up.cast<double>();
    for (Index i = 0; i < branch.head_count; ++i) {
      const Index h = branch.first_head + i;
      const MatrixD key_up = up.middleRows(i * (n_dim + w), n_dim);
      const MatrixD value_up = up.middleRows(i * (n_dim + w) + n_dim, w);
      out.middleCols(h * w, w) += attend_by_the_book(
          x.rows(), 0,
          [&](Index m, Index n) {
            const auto at_m = static_cast<std::size_t>(m);
            const auto at_n = static_cast<std::size_t>(n);
            const VectorD query = q[at_m].segment(h * (n_dim + p), n_dim + p);
            return capped(static_cast<double>(a.scale) * (query.head(n_dim).dot(key_up * latent[b][at_n]) +
                                                          query.tail(p).dot(rotary_key[at_n])),
                          a.softcap);
          },
          [&](Index n) -> VectorD { return value_up * latent[b][static_cast<std::size_t>(n)]; });
    }
  }
  return out;
}

}  // namespace relatent::testing_support
