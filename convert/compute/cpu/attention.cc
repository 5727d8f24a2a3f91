#include "convert/compute/cpu/attention.h"

#include <Eigen/Dense>
#include <algorithm>

#include "convert/compute/cpu/products.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

// Queries handled at once: large enough for the BLAS, small enough that scores stay in the cache.
constexpr Index query_block = 128;

struct SoftmaxShape {
  float scale = 1;
  float softcap = 0;
  std::optional<Index> window{};
};

// out += softmax(scale q kᵀ, causal) v for one head; q [T, d], k [T, d], v [T, w], out [T, w]. mass_by_age,
// when given, receives the attention mass with Δ counted down: its entry T - 1 - Δ. scratch is reused between
// calls.
void attend(const ConstRows& q, const ConstRows& k, const ConstRows& v, SoftmaxShape shape, MatrixF& scratch,
            double* mass_by_age, Rows out) {
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
      float scale = shape.scale;
      if (shape.softcap > 0) {
        row = (row * (shape.scale / shape.softcap)).tanh();
        scale = shape.softcap;
      }
      const float peak = row.maxCoeff();
      row = ((row - peak) * scale).exp();
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

// The two things that latents of normalised keys read, side by side.
MatrixF keys_and_values(const Linear& k, const RmsNorm& k_norm, const Linear& v, const MatrixF& x) {
  MatrixF keys = product(k, x);
  normalise(k_norm, keys);
  const MatrixF values = product(v, x);
  MatrixF out(x.rows(), keys.cols() + values.cols());
  out << keys, values;
  return out;
}

}  // namespace

MatrixF attention_forward(const GqaAttention& attention, const MatrixF& x, const RotaryTable& table,
                          DistanceMass* mass) {
  return attention_forward(attention, project(attention, x, table), mass);
}

GqaProjections project_unrotated(const GqaAttention& attention, const MatrixF& x) {
  GqaProjections out{product(attention.q, x), product(attention.k, x), product(attention.v, x)};
  normalise(attention.q_norm, out.q);
  normalise(attention.k_norm, out.k);
  return out;
}

void rotate(const GqaAttention& attention, const RotaryTable& table, GqaProjections& projections) {
  rotate_in_place(table, 0, attention.head_dim, attention.heads, projections.q);
  rotate_in_place(table, 0, attention.head_dim, attention.kv_heads, projections.k);
}

GqaProjections project(const GqaAttention& attention, const MatrixF& x, const RotaryTable& table) {
  GqaProjections out = project_unrotated(attention, x);
  rotate(attention, table, out);
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
           {attention.scale, attention.softcap, attention.window}, scratch,
           mass != nullptr ? by_age.data() : nullptr, out.middleCols(h * d, d));
    if (mass != nullptr) {
      mass->sum.row(h) += by_age.reverse().transpose();
    }
  }
  return out;
}

MatrixF attention_output(const Linear& o, const RmsNorm& output_norm, const MatrixF& heads) {
  MatrixF out = product(o, heads);
  normalise(output_norm, out);
  return out;
}

MatrixF key_features(const GqaAttention& attention, const MatrixF& x) {
  return keys_and_values(attention.k, attention.k_norm, attention.v, x);
}

MatrixF key_features(const NormedHeads& heads, const MatrixF& x) {
  return keys_and_values(heads.k, heads.k_norm, heads.v, x);
}

MatrixF queries_of(const LatentAttention& attention, const MatrixF& x) {
  const MatrixF features = query_features(attention, x);
  if (!attention.normed_heads) {
    return product(attention.q, features);
  }
  const Index d = attention.normed_heads->head_dim;
  const Index size = attention.nope_dim + attention.rope_dim;
  MatrixF out(x.rows(), attention.heads * size);
  for (Index h = 0; h < attention.heads; ++h) {
    out.middleCols(h * size, size).noalias() =
        features.middleCols(h * d, d) * attention.q.weight.middleRows(h * size, size).transpose();
  }
  if (attention.q.bias.size() > 0) {
    out.rowwise() += attention.q.bias;
  }
  return out;
}

MatrixF query_features(const LatentAttention& attention, const MatrixF& x) {
  if (attention.normed_heads) {
    const NormedHeads& heads = *attention.normed_heads;
    MatrixF out = product(heads.q, x);
    normalise(heads.q_norm, out);
    return out.middleCols(heads.first_head * heads.head_dim, attention.heads * heads.head_dim);
  }
  if (attention.q_down.out() == 0) {
    return x;
  }
  MatrixF out = product(attention.q_down, x);
  if (attention.q_norm.present()) {
    normalise(attention.q_norm, out);
  }
  return out;
}

MatrixF attention_forward(const LatentAttention& attention, const MatrixF& x, const RotaryTable& table,
                          DistanceMass* mass) {
  const Stage stage("attention");
  const Index n = attention.nope_dim;
  const Index p = attention.rope_dim;
  const Index w = attention.v_dim;
  MatrixF q = queries_of(attention, x);
  rotate_in_place(table, n, n + p, attention.heads, q);
  const MatrixF features = attention.normed_heads ? key_features(*attention.normed_heads, x) : MatrixF();
  const MatrixF& inputs = attention.normed_heads ? features : x;
  MatrixF rotary_key = product(attention.rotary_key, inputs);
  rotate_in_place(table, 0, p, 1, rotary_key);
  const VectorF shrink = inverse_rms(attention.norm_rows, attention.norm_eps, inputs);
  std::vector<MatrixF> shared;
  for (const Linear& latent : attention.shared) {
    shared.push_back(product(latent, inputs));
  }

  MatrixF out = MatrixF::Zero(inputs.rows(), attention.heads * w);
  MatrixF scratch;
  MatrixF key(inputs.rows(), n + p);
  key.rightCols(p) = rotary_key;
  VectorD by_age(mass != nullptr ? inputs.rows() : 0);
  for (const LatentBranch& branch : attention.branches) {
    MatrixF latent = product(branch.down, inputs);
    if (branch.shared) {
      const MatrixF& first = shared[static_cast<std::size_t>(*branch.shared)];
      MatrixF whole(inputs.rows(), first.cols() + latent.cols());
      whole << first, latent;
      latent = std::move(whole);
    }
    if (branch.norm.present()) {
      normalise(branch.norm, latent);
    }
    if (shrink.size() > 0) {
      latent.array().colwise() *= shrink.array();
    }
    MatrixF expanded(inputs.rows(), branch.up.rows());
    expanded.noalias() = latent * branch.up.transpose();
    for (Index i = 0; i < branch.head_count; ++i) {
      const Index h = branch.first_head + i;
      key.leftCols(n) = expanded.middleCols(i * (n + w), n);
      by_age.setZero();
      attend(q.middleCols(h * (n + p), n + p), key, expanded.middleCols(i * (n + w) + n, w),
             {attention.scale, attention.softcap}, scratch, mass != nullptr ? by_age.data() : nullptr,
             out.middleCols(h * w, w));
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

MatrixF attention_forward(const Attention& attention, const MatrixF& x, const RotaryTable& table,
                          DistanceMass* mass) {
  return std::visit([&](const auto& kind) { return attention_forward(kind, x, table, mass); }, attention);
}

MlaProjections project(const LatentAttention& attention, const MatrixF& x, const RotaryTable& table) {
  const LatentBranch& branch = attention.branches.front();
  const Index n = attention.nope_dim;
  const Index p = attention.rope_dim;
  const Index w = attention.v_dim;
  const Index r = branch.down.out();
  MatrixF q = queries_of(attention, x);
  rotate_in_place(table, n, n + p, attention.heads, q);
  MlaProjections out;
  out.query.resize(x.rows(), attention.heads * (p + r));
  for (Index h = 0; h < attention.heads; ++h) {
    out.query.middleCols(h * (p + r), p) = q.middleCols(h * (n + p) + n, p);
    out.query.middleCols(h * (p + r) + p, r).noalias() =
        q.middleCols(h * (n + p), n) * branch.up.middleRows(h * (n + w), n);
  }
  MatrixF rotary_key = product(attention.rotary_key, x);
  rotate_in_place(table, 0, p, 1, rotary_key);
  MatrixF latent = product(branch.down, x);
  if (branch.norm.present()) {
    normalise(branch.norm, latent);
  }
  out.key.resize(x.rows(), p + r);
  out.key << rotary_key, latent;
  return out;
}

}  // namespace relatent
