#include "convert/model/attention.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "linalg/stages.h"

namespace relatent {
namespace {

using ConstBlock = Eigen::Ref<const MatrixF, 0, Eigen::OuterStride<>>;
using Block = Eigen::Ref<MatrixF, 0, Eigen::OuterStride<>>;

// Queries handled at once: large enough for the BLAS, small enough that scores stay in the cache.
constexpr Index query_block = 128;

struct SoftmaxShape {
  float scale = 1;
  std::optional<Index> window{};
};

// out += softmax(scale q kᵀ, causal) v for one head; q [T, d], k [T, d], v [T, w], out [T, w]. mass_by_age,
// when given, receives the attention mass with Δ counted down: its entry T - 1 - Δ. scratch is reused between
// calls.
void attend(const ConstBlock& q, const ConstBlock& k, const ConstBlock& v, SoftmaxShape shape,
            MatrixF& scratch, double* mass_by_age, Block out) {
  const Index length = q.rows();
  VectorF mass = VectorF::Zero(mass_by_age != nullptr ? length : 0);
  for (Index first = 0; first < length; first += query_block) {
    const Index rows = std::min(query_block, length - first);
    const Index cols = first + rows;
    const Index from = shape.window ? std::max<Index>(0, first - *shape.window + 1) : 0;
    const Index width = cols - from;
    scratch.resize(rows, width);
    scratch.noalias() = q.middleRows(first, rows) * k.middleRows(from, width).transpose();
    for (Index i = 0; i < rows; ++i) {
      const Index m = first + i;
      const Index lowest = shape.window ? std::max<Index>(0, m - *shape.window + 1) - from : 0;
      auto row = scratch.row(i).segment(lowest, m + 1 - from - lowest).array();
      const float peak = row.maxCoeff();
      row = ((row - peak) * shape.scale).exp();
      row *= 1.0F / row.sum();
      scratch.row(i).head(lowest).setZero();
      scratch.row(i).tail(width - (m + 1 - from)).setZero();
      if (mass_by_age != nullptr) {
        mass.segment(length - 1 - m + from + lowest, row.size()).array() += row.transpose();
      }
    }
    out.middleRows(first, rows).noalias() += scratch * v.middleRows(from, width);
  }
  for (Index i = 0; i < mass.size(); ++i) {
    mass_by_age[i] += static_cast<double>(mass(i));
  }
}

}  // namespace

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

MatrixF Linear::operator()(const MatrixF& x) const {
  const Stage stage("products");
  MatrixF y;
  if (packed) {
    y = (*packed)(x);
  } else {
    y.resize(x.rows(), weight.rows());
    y.noalias() = x * weight.transpose();
  }
  if (bias.size() > 0) {
    y.rowwise() += bias;
  }
  return y;
}

void RmsNorm::apply(MatrixF& x) const {
  const auto size = static_cast<float>(x.cols());
  for (Index i = 0; i < x.rows(); ++i) {
    const float inverse = 1.0F / std::sqrt(x.row(i).squaredNorm() / size + eps);
    x.row(i).array() = (x.row(i).array() * inverse) * gain.array();
  }
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

MatrixF attention_forward(const GqaAttention& attention, const MatrixF& x, const RotaryTable& table,
                          DistanceMass* mass) {
  return attention_forward(attention, project(attention, x, table), mass);
}

GqaProjections project(const GqaAttention& attention, const MatrixF& x, const RotaryTable& table) {
  GqaProjections out{attention.q(x), attention.k(x), attention.v(x)};
  rotate_in_place(table, 0, attention.head_dim, attention.heads, out.q);
  rotate_in_place(table, 0, attention.head_dim, attention.kv_heads, out.k);
  return out;
}

MatrixF attention_forward(const GqaAttention& attention, const GqaProjections& projections,
                          DistanceMass* mass) {
  const Stage stage("attention");
  const Index d = attention.head_dim;
  const auto& [q, k, v] = projections;
  MatrixF out = MatrixF::Zero(q.rows(), attention.heads * d);
  MatrixF scratch;
  VectorD by_age(mass != nullptr ? q.rows() : 0);
  for (Index h = 0; h < attention.heads; ++h) {
    const Index g = attention.group_of(h);
    by_age.setZero();
    attend(q.middleCols(h * d, d), k.middleCols(g * d, d), v.middleCols(g * d, d),
           {attention.scale, attention.window}, scratch, mass != nullptr ? by_age.data() : nullptr,
           out.middleCols(h * d, d));
    if (mass != nullptr) {
      mass->sum.row(h) += by_age.reverse().transpose();
    }
  }
  return out;
}

MatrixF query_features(const LatentAttention& attention, const MatrixF& x) {
  if (attention.q_down.out() == 0) {
    return x;
  }
  MatrixF out = attention.q_down(x);
  if (attention.q_norm.present()) {
    attention.q_norm.apply(out);
  }
  return out;
}

VectorF inverse_rms(const MatrixF& rows, float eps, const ConstBlock& x) {
  if (rows.rows() == 0) {
    return {};
  }
  MatrixF y(x.rows(), rows.rows());
  y.noalias() = x * rows.transpose();
  return (y.rowwise().squaredNorm().array() / static_cast<float>(y.cols()) + eps).sqrt().inverse();
}

MatrixF attention_forward(const LatentAttention& attention, const MatrixF& x, const RotaryTable& table,
                          DistanceMass* mass) {
  const Stage stage("attention");
  const Index n = attention.nope_dim;
  const Index p = attention.rope_dim;
  const Index w = attention.v_dim;
  MatrixF q = attention.q(query_features(attention, x));
  rotate_in_place(table, n, n + p, attention.heads, q);
  MatrixF rotary_key = attention.rotary_key(x);
  rotate_in_place(table, 0, p, 1, rotary_key);
  const VectorF shrink = inverse_rms(attention.norm_rows, attention.norm_eps, x);
  std::vector<MatrixF> shared;
  for (const Linear& latent : attention.shared) {
    shared.push_back(latent(x));
  }

  MatrixF out = MatrixF::Zero(x.rows(), attention.heads * w);
  MatrixF scratch;
  MatrixF key(x.rows(), n + p);
  key.rightCols(p) = rotary_key;
  VectorD by_age(mass != nullptr ? x.rows() : 0);
  for (const LatentBranch& branch : attention.branches) {
    MatrixF latent = branch.down(x);
    if (branch.shared >= 0) {
      const MatrixF& first = shared[static_cast<std::size_t>(branch.shared)];
      MatrixF whole(x.rows(), first.cols() + latent.cols());
      whole << first, latent;
      latent = std::move(whole);
    }
    if (branch.norm.present()) {
      branch.norm.apply(latent);
    }
    if (shrink.size() > 0) {
      latent.array().colwise() *= shrink.array();
    }
    MatrixF expanded(x.rows(), branch.up.rows());
    expanded.noalias() = latent * branch.up.transpose();
    for (Index i = 0; i < branch.head_count; ++i) {
      const Index h = branch.first_head + i;
      key.leftCols(n) = expanded.middleCols(i * (n + w), n);
      by_age.setZero();
      attend(q.middleCols(h * (n + p), n + p), key, expanded.middleCols(i * (n + w) + n, w),
             {attention.scale}, scratch, mass != nullptr ? by_age.data() : nullptr, out.middleCols(h * w, w));
      if (mass != nullptr) {
        const auto share = static_cast<double>(std::count_if(
            attention.branches.begin(), attention.branches.end(), [&](const LatentBranch& other) {
              return h >= other.first_head && h < other.first_head + other.head_count;
            }));
        mass->sum.row(h) += by_age.reverse().transpose() / share;
      }
    }
  }
  return out;
}

MatrixF attention_forward(const Attention& attention, const MatrixF& x, const RotaryTable& table) {
  return std::visit([&](const auto& kind) { return attention_forward(kind, x, table); }, attention);
}

const Linear& output_projection(const Attention& attention) {
  return std::visit([](const auto& kind) -> const Linear& { return kind.o; }, attention);
}

const Rotary& rotary_of(const Attention& attention) {
  return std::visit([](const auto& kind) -> const Rotary& { return kind.rotary; }, attention);
}

}  // namespace relatent
