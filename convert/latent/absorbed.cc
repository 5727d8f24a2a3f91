#include "convert/latent/absorbed.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "linalg/decompose.h"

namespace relatent {
namespace {

// Directions of the latent below this part of its largest variance count as this large.
constexpr double variance_floor = 1e-10;

// [D + 1, D + 1] moments to the covariance of map x̃; with a completion the latent is divided by ρ, which is
// near 1.
MatrixD covariance(const MatrixD& map, const MatrixD& input_moment) {
  const VectorD mean = map * input_moment.rightCols<1>();
  MatrixD out = map * input_moment * map.transpose();
  out -= mean * mean.transpose();
  return 0.5 * (out + out.transpose());
}

// query = up downᵀ for one head's content query [r, D + 1], with at most nope_dim columns.
struct ContentFactors {
  MatrixD up;    // [r, n]
  MatrixD down;  // [n, D + 1]
};

ContentFactors factor_content(const MatrixD& content, const SymmetricRoot& latent_root,
                              const MatrixD& query_moment, Index n) {
  const MatrixD weighed = latent_root.root * content;
  MatrixD energy = weighed * query_moment * weighed.transpose();
  energy = (0.5 * (energy + energy.transpose())).eval();
  const Index kept = std::min(n, content.rows());
  const MatrixD basis = symmetric_eigenpairs(energy, kept).vectors;
  return {latent_root.inverse * basis, basis.transpose() * weighed};
}

Linear to_linear(const MatrixD& map) {
  Linear out;
  out.weight = map.leftCols(map.cols() - 1).cast<float>();
  if (!map.rightCols<1>().isZero(0)) {
    out.bias = map.rightCols<1>().transpose().cast<float>();
  }
  return out;
}

// Mean square of the stored latent: far above any engine's eps (1e-6 or 1e-5), far below float16's end.
constexpr double stored_mean_square = 256;

// The latent as an engine with an RMSNorm stores it.
void add_norm(const AbsorbedAttention& a, LatentBranch& branch) {
  const Index r = a.rank();
  const Index size = a.norm.square.size();
  const VectorD scale = a.norm.square.cwiseSqrt() * std::sqrt(static_cast<double>(size));
  MatrixD down(size, a.key.cols());
  down << a.latent(), a.norm.extra;
  down = (std::sqrt(stored_mean_square) * scale.asDiagonal() * down).eval();
  branch.down = to_linear(down);
  MatrixF up = MatrixF::Zero(branch.up.rows(), size);
  up.leftCols(r) = (branch.up.cast<double>() * scale.head(r).cwiseInverse().asDiagonal()).cast<float>();
  branch.up = std::move(up);
  branch.norm.gain = RowVectorF::Ones(size);
  branch.norm.eps = 1e-6F;
}

}  // namespace

VectorF latent_shrink(const AbsorbedAttention& attention, const MatrixF& inputs) {
  return attention.norm.present() ? inverse_norm(attention.norm, attention.latent(), inputs) : VectorF();
}

AbsorbedAttention absorb(const LayerMaps& maps, const RotaryKey& key,
                         const std::vector<JointLatent>& latents) {
  const Index d = maps.head_dim;
  const Index p = key.rope_dim();
  Index r = 0;
  for (const JointLatent& latent : latents) {
    r += latent.rank();
  }
  AbsorbedAttention out;
  out.nope_dim = key.nope_dim();
  out.scale = maps.scale;
  out.rotary = key.rotary;
  out.key.resize(p + r, maps.k.cols());
  out.key.topRows(p) = key.read * maps.k;
  out.o = maps.o;
  VectorD shift(maps.heads * d);
  Index first = 0;
  for (const JointLatent& latent : latents) {
    LatentGroup group;
    group.first_head = latent.first_head;
    group.head_count = latent.heads_of(maps.heads);
    group.first = first;
    group.rank = latent.rank();
    group.key_rank = latent.key_rank < 0 ? group.rank : latent.key_rank;
    out.key.middleRows(p + first, group.rank) = latent.down;
    first += group.rank;
    for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
      const Index g = (maps.group_of(h) - latent.first_kv_head) * d;
      const auto at = static_cast<std::size_t>(h);
      const MatrixD head = maps.query_of(h);
      MatrixD query(p + group.key_rank, maps.q.cols());
      query.topRows(p) = maps.scale * key.query[at] * head;
      query.bottomRows(group.key_rank) = maps.scale *
                                         latent.key_up.middleRows(g, d).leftCols(group.key_rank).transpose() *
                                         (key.content_query[at] * head);
      out.query.push_back(std::move(query));
      out.value_up.emplace_back(latent.value_up.middleRows(g, d));
      shift.segment(h * d, d) = latent.value_shift.segment(g, d);
    }
    out.groups.push_back(group);
  }
  out.o_bias = maps.o_bias + maps.o * shift;
  return out;
}

void limit_content_rank(AbsorbedAttention& attention, const MatrixD& input_moment,
                        const MatrixD& query_moment) {
  for (const LatentGroup& group : attention.groups) {
    if (group.key_rank <= attention.nope_dim) {
      continue;
    }
    const SymmetricRoot root =
        symmetric_root(covariance(attention.key_latent_of(group), input_moment), variance_floor);
    for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
      MatrixD& query = attention.query[static_cast<std::size_t>(h)];
      const ContentFactors f =
          factor_content(query.bottomRows(group.key_rank), root, query_moment, attention.nope_dim);
      query.bottomRows(group.key_rank) = f.up * f.down;
    }
  }
}

LatentAttention to_latent_attention(const AbsorbedAttention& a, const MatrixD& input_moment,
                                    const MatrixD& query_moment) {
  const Index n = a.nope_dim;
  const Index p = a.rope_dim();
  const Index w = a.v_dim();
  LatentAttention out;
  out.heads = a.heads();
  out.nope_dim = n;
  out.rope_dim = p;
  out.v_dim = w;
  out.scale = static_cast<float>(a.scale);
  out.rotary = a.rotary;
  out.rotary_key = to_linear(a.key.topRows(p));

  MatrixD q = MatrixD::Zero(out.heads * (n + p), a.query.front().cols());
  for (const LatentGroup& group : a.groups) {
    LatentBranch branch;
    branch.down = to_linear(a.latent_of(group));
    branch.first_head = group.first_head;
    branch.head_count = group.head_count;
    const MatrixD half = a.latent_of(group) * input_moment;
    branch.mean_square = half.cwiseProduct(a.latent_of(group)).sum() / static_cast<double>(group.rank);
    branch.up = MatrixF::Zero(group.head_count * (n + w), group.rank);
    const SymmetricRoot root =
        symmetric_root(covariance(a.key_latent_of(group), input_moment), variance_floor);
    for (Index i = 0; i < group.head_count; ++i) {
      const Index h = group.first_head + i;
      const auto at = static_cast<std::size_t>(h);
      const ContentFactors f = factor_content(a.query[at].bottomRows(group.key_rank), root, query_moment, n);
      branch.up.block(i * (n + w), 0, f.up.cols(), group.key_rank) = f.up.transpose().cast<float>();
      branch.up.middleRows(i * (n + w) + n, w) = a.value_up[at].cast<float>();
      q.middleRows(h * (n + p), f.down.rows()) = f.down / a.scale;
      q.middleRows(h * (n + p) + n, p) = a.query[at].topRows(p) / a.scale;
    }
    if (a.norm.present()) {
      add_norm(a, branch);
    }
    out.branches.push_back(std::move(branch));
  }
  out.q = to_linear(q);
  out.q_mean_square = query_moment.diagonal().head(query_moment.cols() - 1).mean();
  out.o.weight = a.o.cast<float>();
  if (!a.o_bias.isZero(0)) {
    out.o.bias = a.o_bias.transpose().cast<float>();
  }
  return out;
}

}  // namespace relatent
