#include "convert/compute/cpu/attention.h"

#include <Eigen/Dense>
#include <algorithm>

#include "convert/compute/cpu/products.h"
#include "linalg/decompose.h"
#include "linalg/moments.h"
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

// Of R_h² no direction is dropped; below this part of the largest they are raised to it.
constexpr double root_floor = 1e-12;

// AttentionSums of one head.
class HeadSums {
 public:
  // v: [length, v size] of the head; root: R_h, or empty.
  HeadSums(const ConstRows& v, const MatrixF* root)
      : by_age_(VectorF::Zero(v.rows())), received_(VectorF::Zero(v.rows())), root_(root) {
    if (root_ != nullptr) {
      seen_.noalias() = v * *root_;
      seen_square_ = seen_.rowwise().squaredNorm();
    }
  }

  // The weights of queries `first` ... on keys `from` ..., zero where a query sees none, and what they mix of
  // v.
  void add(const MatrixF& weights, const MatrixF& mixed, Index first, Index from) {
    const Index length = by_age_.size();
    const Index width = weights.cols();
    const Index skipped = from == 0 ? 1 : 0;
    for (Index i = 0; i < weights.rows(); ++i) {
      const Index visible = first + i - from + 1;
      received_.segment(from, visible) += weights.row(i).head(visible).transpose();
      // Of key n the age is first + i - n.
      by_age_.segment(length - visible + skipped, visible - skipped) +=
          weights.row(i).segment(skipped, visible - skipped).transpose();
    }
    const MatrixF square = weights.cwiseAbs2();
    const VectorF sums = square.rowwise().sum();
    mass_square_ += sums.cast<double>().sum();
    if (root_ == nullptr) {
      return;
    }
    const MatrixF output = mixed * *root_;
    const MatrixF values = square * seen_.middleRows(from, width);
    const VectorF squares = square * seen_square_.segment(from, width);
    const VectorF effect = squares - 2 * output.cwiseProduct(values).rowwise().sum() +
                           output.rowwise().squaredNorm().cwiseProduct(sums);
    score_effect_ += effect.cwiseMax(0).cast<double>().sum();
  }

  void add_to(AttentionSums& sums, Index head, double share) const {
    sums.distance_mass.row(head) += share * by_age_.reverse().cast<double>().transpose();
    sums.received += share * received_.cast<double>();
    sums.mass_square(head) += share * mass_square_;
    sums.score_effect(head) += share * score_effect_;
  }

 private:
  VectorF by_age_;  // at length - 1 - Δ
  VectorF received_;
  const MatrixF* root_;
  MatrixF seen_;  // R_h v
  VectorF seen_square_;
  double mass_square_ = 0;
  double score_effect_ = 0;
};

std::optional<HeadSums> head_sums(const AttentionSums* sums, Index head, const ConstRows& v) {
  if (sums == nullptr) {
    return std::nullopt;
  }
  return HeadSums(v, sums->roots != nullptr ? &(*sums->roots)[static_cast<std::size_t>(head)] : nullptr);
}

// out += softmax(scale q kᵀ, causal) v for one head; q [T, d], k [T, d], v [T, w], out [T, w]. scratch is
// reused between calls.
void attend(const ConstRows& q, const ConstRows& k, const ConstRows& v, SoftmaxShape shape, MatrixF& scratch,
            HeadSums* sums, Rows out) {
  const Index length = q.rows();
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
    }
    if (sums == nullptr) {
      out.middleRows(first, rows).noalias() += scratch * v.middleRows(from, width);
      continue;
    }
    const MatrixF mixed = scratch * v.middleRows(from, width);
    out.middleRows(first, rows) += mixed;
    sums->add(scratch, mixed, first, from);
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

AttentionSums::AttentionSums(Index heads, Index length, const std::vector<MatrixF>* the_roots)
    : distance_mass(MatrixD::Zero(heads, length)),
      received(VectorD::Zero(length)),
      mass_square(VectorD::Zero(heads)),
      score_effect(VectorD::Zero(heads)),
      roots(the_roots) {}

std::vector<MatrixF> output_roots(const Attention& attention) {
  const Linear& o = output_projection(attention);
  const auto* gqa = std::get_if<GqaAttention>(&attention);
  const Index heads = std::visit([](const auto& kind) { return kind.heads; }, attention);
  const Index size = gqa != nullptr ? gqa->head_dim : std::get<LatentAttention>(attention).v_dim;
  std::vector<MatrixF> out;
  for (Index h = 0; h < heads; ++h) {
    // W_{O,h}ᵀ. A packed weight cannot be read, but multiplied with.
    MatrixF of_head;
    if (o.packed) {
      MatrixF unit = MatrixF::Zero(size, heads * size);
      unit.middleCols(h * size, size).setIdentity();
      of_head = product({{}, {}, o.packed}, unit);
    } else {
      of_head = o.weight.middleCols(h * size, size).transpose();
    }
    MatrixD square = MatrixD::Zero(size, size);
    square.selfadjointView<Eigen::Lower>().rankUpdate(of_head.cast<double>());
    mirror_lower(square);
    out.emplace_back(symmetric_root(square, root_floor).root.cast<float>());
  }
  return out;
}

MatrixF attention_forward(const GqaAttention& attention, const MatrixF& x, const RotaryTable& table,
                          AttentionSums* sums) {
  return attention_forward(attention, project(attention, x, table), sums);
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
                          AttentionSums* sums) {
  const Stage stage("attention");
  const Index d = attention.head_dim;
  const auto& [q, k, v] = projections;
  MatrixF out = MatrixF::Zero(q.rows(), attention.heads * d);
  MatrixF scratch;
  for (Index h = 0; h < attention.heads; ++h) {
    const Index g = attention.group_of(h);
    std::optional<HeadSums> here = head_sums(sums, h, v.middleCols(g * d, d));
    attend(q.middleCols(h * d, d), k.middleCols(g * d, d), v.middleCols(g * d, d),
           {attention.scale, attention.softcap, attention.window}, scratch, here ? &*here : nullptr,
           out.middleCols(h * d, d));
    if (here) {
      here->add_to(*sums, h, 1);
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
                          AttentionSums* sums) {
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
      std::optional<HeadSums> here = head_sums(sums, h, expanded.middleCols(i * (n + w) + n, w));
      attend(q.middleCols(h * (n + p), n + p), key, expanded.middleCols(i * (n + w) + n, w),
             {attention.scale, attention.softcap}, scratch, here ? &*here : nullptr,
             out.middleCols(h * w, w));
      if (here) {
        const auto branches = static_cast<double>(std::count_if(
            attention.branches.begin(), attention.branches.end(), [&](const LatentBranch& other) {
              return h >= other.first_head && h < other.first_head + other.head_count;
            }));
        here->add_to(*sums, h, 1 / branches);
      }
    }
  }
  return out;
}

MatrixF attention_forward(const Attention& attention, const MatrixF& x, const RotaryTable& table,
                          AttentionSums* sums) {
  return std::visit([&](const auto& kind) { return attention_forward(kind, x, table, sums); }, attention);
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
