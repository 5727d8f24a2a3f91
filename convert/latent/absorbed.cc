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
                              const MatrixD& input_moment, Index n) {
  const MatrixD weighed = latent_root.root * content;
  MatrixD energy = weighed * input_moment * weighed.transpose();
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

AbsorbedAttention absorb(const LayerMaps& maps, const RotaryKey& key, const JointLatent& latent) {
  const Index d = maps.head_dim;
  const Index p = key.rope_dim();
  const Index r = latent.down.rows();
  AbsorbedAttention out;
  out.nope_dim = key.nope_dim();
  out.scale = maps.scale;
  out.rotary = key.rotary;
  out.key.resize(p + r, maps.k.cols());
  out.key << key.read * maps.k, latent.down;
  out.o = maps.o;
  VectorD shift(maps.heads * d);
  for (Index h = 0; h < maps.heads; ++h) {
    const Index g = maps.group_of(h) * d;
    const auto at = static_cast<std::size_t>(h);
    const MatrixD head = maps.query_of(h);
    MatrixD query(p + r, maps.q.cols());
    query.topRows(p) = maps.scale * key.query[at] * head;
    query.bottomRows(r) =
        maps.scale * latent.key_up.middleRows(g, d).transpose() * (key.content_query[at] * head);
    out.query.push_back(std::move(query));
    out.value_up.emplace_back(latent.value_up.middleRows(g, d));
    shift.segment(h * d, d) = latent.value_shift.segment(g, d);
  }
  out.o_bias = maps.o_bias + maps.o * shift;
  return out;
}

void limit_content_rank(AbsorbedAttention& attention, const MatrixD& input_moment) {
  const Index p = attention.rope_dim();
  if (attention.rank() <= attention.nope_dim) {
    return;
  }
  const SymmetricRoot root = symmetric_root(covariance(attention.latent(), input_moment), variance_floor);
  for (MatrixD& query : attention.query) {
    const ContentFactors f =
        factor_content(query.bottomRows(attention.rank()), root, input_moment, attention.nope_dim);
    query.bottomRows(query.rows() - p) = f.up * f.down;
  }
}

LatentAttention to_latent_attention(const AbsorbedAttention& a, const MatrixD& input_moment) {
  const Index n = a.nope_dim;
  const Index p = a.rope_dim();
  const Index r = a.rank();
  const Index w = a.v_dim();
  LatentAttention out;
  out.heads = a.heads();
  out.nope_dim = n;
  out.rope_dim = p;
  out.v_dim = w;
  out.scale = static_cast<float>(a.scale);
  out.rotary = a.rotary;
  out.rotary_key = to_linear(a.key.topRows(p));

  LatentBranch branch;
  branch.down = to_linear(a.latent());
  branch.head_count = out.heads;
  const MatrixD half = a.latent() * input_moment;
  branch.mean_square = half.cwiseProduct(a.latent()).sum() / static_cast<double>(r);
  branch.up = MatrixF::Zero(out.heads * (n + w), r);
  MatrixD q = MatrixD::Zero(out.heads * (n + p), a.key.cols());
  const SymmetricRoot root = symmetric_root(covariance(a.latent(), input_moment), variance_floor);
  for (Index h = 0; h < out.heads; ++h) {
    const auto at = static_cast<std::size_t>(h);
    const ContentFactors f = factor_content(a.query[at].bottomRows(r), root, input_moment, n);
    branch.up.middleRows(h * (n + w), f.up.cols()) = f.up.transpose().cast<float>();
    branch.up.middleRows(h * (n + w) + n, w) = a.value_up[at].cast<float>();
    q.middleRows(h * (n + p), f.down.rows()) = f.down / a.scale;
    q.middleRows(h * (n + p) + n, p) = a.query[at].topRows(p) / a.scale;
  }
  if (a.norm.present()) {
    add_norm(a, branch);
  }
  out.branches.push_back(std::move(branch));
  out.q = to_linear(q);
  out.q_mean_square = input_moment.diagonal().head(a.key.cols() - 1).mean();
  out.o.weight = a.o.cast<float>();
  if (!a.o_bias.isZero(0)) {
    out.o.bias = a.o_bias.transpose().cast<float>();
  }
  return out;
}

}  // namespace relatent
