#include "convert/latent/assemble.h"

#include <Eigen/Dense>

#include "linalg/layouts.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

double mean_square(const MatrixD& map, const Moments& moments) {
  const MatrixD half = moments.input().after(map);
  return half.cwiseProduct(map).sum() / static_cast<double>(map.rows());
}

}  // namespace

LatentAttention assemble(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                         const std::vector<JointLatent>& latents, const std::optional<LowRankQuery>& query) {
  const Stage stage("assemble");
  const Index d = maps.head_dim;
  const Index n = key.nope_dim();
  const Index p = key.rope_dim();
  LatentAttention out;
  out.heads = maps.heads;
  out.nope_dim = n;
  out.rope_dim = p;
  out.v_dim = d;
  out.scale = static_cast<float>(maps.scale);
  out.softcap = maps.softcap;
  out.rotary = key.rotary;

  // Row by row of heads, so that no other copy of the whole query is ever made.
  const Index inputs = query ? query->lift.cols() : maps.query_inputs();
  out.q.weight.resize(maps.heads * (n + p), inputs);
  VectorD q_bias = VectorD::Zero(query ? 0 : out.q.weight.rows());
  MatrixD q(n + p, query ? inputs : inputs + 1);
  for (Index h = 0; h < maps.heads; ++h) {
    const MatrixD head = query ? MatrixD(query->lift.middleRows(h * d, d)) : maps.query_of(h);
    q.topRows(n).noalias() = key.content_query[static_cast<std::size_t>(h)] * head;
    q.bottomRows(p).noalias() = key.query[static_cast<std::size_t>(h)] * head;
    copy_tiled(q.leftCols(inputs), out.q.weight.middleRows(h * (n + p), n + p));
    if (!query) {
      q_bias.segment(h * (n + p), n + p) = q.rightCols<1>();
    }
  }
  if (!q_bias.isZero(0)) {
    out.q.bias = q_bias.transpose().cast<float>();
  }
  if (query) {
    out.q_down = linear_of(query->down);
    out.q_mean_square = mean_square(query->down, moments);
  } else {
    out.q_mean_square = moments.queries().of(0).diagonal().head(inputs).mean();
  }
  out.normed_heads = maps.normed_heads;
  out.rotary_key = linear_of(key.read * maps.k);

  VectorD shift(maps.heads * d);
  for (const JointLatent& latent : latents) {
    LatentBranch branch;
    branch.down = linear_of(latent.down);
    branch.first_head = latent.first_head;
    branch.head_count = latent.heads_of(maps.heads);
    branch.mean_square = mean_square(latent.down, moments);
    branch.up.resize(branch.head_count * (n + d), latent.down.rows());
    for (Index i = 0; i < branch.head_count; ++i) {
      const Index h = latent.first_head + i;
      const Index g = (maps.group_of(h) - latent.first_kv_head) * d;
      if (n > 0) {
        branch.up.middleRows(i * (n + d), n) = latent.key_up.middleRows(g, n).cast<float>();
      }
      branch.up.middleRows(i * (n + d) + n, d) = latent.value_up.middleRows(g, d).cast<float>();
      shift.segment(h * d, d) = latent.value_shift.segment(g, d);
    }
    out.branches.push_back(std::move(branch));
  }

  out.o.weight = maps.o;
  VectorD o_bias = maps.o_bias;
  if (!shift.isZero(0)) {
    o_bias += widened(maps.o) * shift;
  }
  if (!o_bias.isZero(0)) {
    out.o.bias = o_bias.transpose().cast<float>();
  }
  return out;
}

LatentAttention assemble_mla(const LayerMaps& maps, const Moments& moments, const RotaryKey& key,
                             const JointLatent& latent, const std::optional<LowRankQuery>& query) {
  return assemble(maps, moments, key, {latent}, query);
}

}  // namespace relatent
