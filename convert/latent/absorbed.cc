#include "convert/latent/absorbed.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "convert/compute/backend.h"
#include "convert/latent/branch_norms.h"
#include "convert/latent/partition.h"
#include "linalg/layouts.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Directions of the latent below this part of its largest variance count as this large.
constexpr double variance_floor = 1e-10;

// [D + 1, D + 1] moments to the covariance of map x̃; with a completion the latent is divided by ρ, which is
// near 1.
MatrixD covariance(const MatrixD& map, MomentRef input_moment) {
  const VectorD mean = map * input_moment.last_column();
  MatrixD out = input_moment.after(map) * map.transpose();
  out -= mean * mean.transpose();
  return 0.5 * (out + out.transpose());
}

// query_b = up_b down for one head and its parts b, with at most nope_dim columns in all.
struct ContentFactors {
  std::vector<MatrixD> up;  // [r_b, n]
  MatrixD down;             // [n, Q + 1]
};

ContentFactors factor_content(const std::vector<MatrixD>& content, const std::vector<SymmetricRoot>& roots,
                              MomentRef query_moment, Index n) {
  Index rows = 0;
  for (const MatrixD& part : content) {
    rows += part.rows();
  }
  MatrixD weighed(rows, query_moment.size());
  Index row = 0;
  for (std::size_t b = 0; b < content.size(); ++b) {
    weighed.middleRows(row, content[b].rows()) = roots[b].root * content[b];
    row += content[b].rows();
  }
  const Index kept = std::min(n, rows);
  const MatrixD basis = backend().symmetric_eigenpairs(second_moment(weighed, query_moment), kept).vectors;
  ContentFactors out{{}, basis.transpose() * weighed};
  row = 0;
  for (std::size_t b = 0; b < content.size(); ++b) {
    out.up.emplace_back(roots[b].inverse * basis.middleRows(row, content[b].rows()));
    row += content[b].rows();
  }
  return out;
}

std::vector<SymmetricRoot> key_roots(const AbsorbedAttention& a, const LatentGroup& group,
                                     MomentRef input_moment) {
  std::vector<SymmetricRoot> out;
  for (const LatentPart& part : group.parts) {
    out.push_back(
        backend().symmetric_root(covariance(key_latent_of(a, group, part), input_moment), variance_floor));
  }
  return out;
}

// What the content queries of one head are, part by part.
std::vector<MatrixD> content_of(const AbsorbedAttention& a, const LatentGroup& group, Index head) {
  std::vector<MatrixD> out;
  for (const LatentPart& part : group.parts) {
    out.emplace_back(a.query[static_cast<std::size_t>(head)].middleRows(part.query, group.width(part)));
  }
  return out;
}

Index content_rows(const LatentGroup& group) {
  Index out = 0;
  for (const LatentPart& part : group.parts) {
    out += group.width(part);
  }
  return out;
}

}  // namespace

MatrixD key_latent_of(const AbsorbedAttention& a, const LatentGroup& group, const LatentPart& part) {
  const auto all = a.latent_of(group);
  MatrixD out(group.width(part), a.key.cols());
  out << all.topRows(group.shared), all.middleRows(part.first, part.rank);
  return out;
}

void divide(Index count, Index key_rank, Index rope_dim, LatentGroup& group) {
  group.shared = count > 1 ? key_rank : 0;
  group.parts.clear();
  const Index own = group.rank - group.shared;
  Index query = rope_dim;
  for (Index b = 0; b < count; ++b) {
    const Index from = cut_at(b, count, own);
    group.parts.push_back({group.shared + from, cut_at(b + 1, count, own) - from, query});
    query += group.width(group.parts.back());
  }
}

AbsorbedAttention absorb(const LayerMaps& maps, const RotaryKey& key, const std::vector<JointLatent>& latents,
                         Index parts) {
  const Stage stage("assemble");
  const Index d = maps.head_dim;
  const Index p = key.rope_dim();
  Index r = 0;
  for (const JointLatent& latent : latents) {
    r += latent.rank();
  }
  AbsorbedAttention out;
  out.nope_dim = key.nope_dim();
  out.scale = maps.scale;
  out.softcap = maps.softcap;
  out.rotary = key.rotary;
  out.key.resize(p + r, maps.k.cols());
  out.key.topRows(p) = key.read * maps.k;
  out.o = widened(maps.o);
  VectorD shift(maps.heads * d);
  Index first = 0;
  for (const JointLatent& latent : latents) {
    LatentGroup group;
    group.first_head = latent.first_head;
    group.head_count = latent.heads_of(maps.heads);
    group.first = first;
    group.rank = latent.rank();
    divide(parts, latent.key_rank.value_or(latent.rank()), p, group);
    out.key.middleRows(p + first, group.rank) = latent.down;
    first += group.rank;
    for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
      const Index g = (maps.group_of(h) - latent.first_kv_head) * d;
      const auto at = static_cast<std::size_t>(h);
      const MatrixD head = maps.query_of(h);
      const MatrixD content = key.content_query[at] * head;
      MatrixD query(group.query_rows(), head.cols());
      query.topRows(p) = maps.scale * key.query[at] * head;
      for (const LatentPart& part : group.parts) {
        MatrixD up(d, group.width(part));
        up << latent.key_up.block(g, 0, d, group.shared), latent.key_up.block(g, part.first, d, part.rank);
        query.middleRows(part.query, up.cols()) = maps.scale * up.transpose() * content;
      }
      out.query.push_back(std::move(query));
    }
    for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
      const Index g = (maps.group_of(h) - latent.first_kv_head) * d;
      out.value_up.emplace_back(latent.value_up.middleRows(g, d));
      shift.segment(h * d, d) = latent.value_shift.segment(g, d);
    }
    out.groups.push_back(std::move(group));
  }
  out.o_bias = maps.o_bias + out.o * shift;
  return out;
}

void limit_content_rank(AbsorbedAttention& attention, MomentRef input_moment,
                        const QueryMoments& query_moments) {
  const Stage stage("limit query rank");
  for (const LatentGroup& group : attention.groups) {
    if (content_rows(group) <= attention.nope_dim) {
      continue;
    }
    const std::vector<SymmetricRoot> roots = key_roots(attention, group, input_moment);
    parallel_for(static_cast<std::size_t>(group.head_count), [&](std::size_t i) {
      const Index h = group.first_head + static_cast<Index>(i);
      const ContentFactors f =
          factor_content(content_of(attention, group, h), roots, query_moments.of(h), attention.nope_dim);
      for (std::size_t b = 0; b < group.parts.size(); ++b) {
        attention.query[static_cast<std::size_t>(h)].middleRows(
            group.parts[b].query, group.width(group.parts[b])) = f.up[b] * f.down;
      }
    });
  }
}

LatentAttention to_latent_attention(const AbsorbedAttention& a, MomentRef input_moment,
                                    const QueryMoments& query_moments) {
  const Stage stage("assemble");
  const Index n = a.nope_dim;
  const Index p = a.rope_dim();
  const Index w = a.v_dim();
  LatentAttention out;
  out.heads = a.heads();
  out.nope_dim = n;
  out.rope_dim = p;
  out.v_dim = w;
  out.scale = static_cast<float>(a.scale);
  out.softcap = a.softcap;
  out.rotary = a.rotary;
  out.rotary_key = linear_of(a.key.topRows(p));
  out.norm_rows = a.norm_rows;
  out.norm_eps = a.norm_eps;

  MatrixD q = MatrixD::Zero(out.heads * (n + p), a.query.front().cols());
  const std::size_t group_count = a.groups.size();
  out.branches.resize(group_count * a.groups.front().parts.size());
  for (std::size_t g = 0; g < group_count; ++g) {
    const LatentGroup& group = a.groups[g];
    const MatrixD latent = a.latent_of(group);
    if (group.shared > 0) {
      out.shared.push_back(linear_of(latent.topRows(group.shared)));
    }
    const MatrixD half = input_moment.after(latent);
    const double mean_square = half.cwiseProduct(latent).sum() / static_cast<double>(group.rank);
    for (std::size_t b = 0; b < group.parts.size(); ++b) {
      const LatentPart& part = group.parts[b];
      LatentBranch& branch = out.branches[b * group_count + g];
      branch.down = linear_of(latent.middleRows(part.first, part.rank));
      if (group.shared > 0) {
        branch.shared = static_cast<Index>(out.shared.size()) - 1;
      }
      branch.first_head = group.first_head;
      branch.head_count = group.head_count;
      branch.mean_square = mean_square;
      branch.up = MatrixF::Zero(group.head_count * (n + w), group.width(part));
    }
    const std::vector<SymmetricRoot> roots = key_roots(a, group, input_moment);
    parallel_for(static_cast<std::size_t>(group.head_count), [&](std::size_t head) {
      const auto i = static_cast<Index>(head);
      const Index h = group.first_head + i;
      const auto at = static_cast<std::size_t>(h);
      const ContentFactors f = factor_content(content_of(a, group, h), roots, query_moments.of(h), n);
      for (std::size_t b = 0; b < group.parts.size(); ++b) {
        const LatentPart& part = group.parts[b];
        MatrixF& up = out.branches[b * group_count + g].up;
        up.middleRows(i * (n + w), f.up[b].cols()) = f.up[b].transpose().cast<float>();
        if (b == 0) {
          up.block(i * (n + w) + n, 0, w, group.shared) = a.value_up[at].leftCols(group.shared).cast<float>();
        }
        up.block(i * (n + w) + n, group.shared, w, part.rank) =
            a.value_up[at].middleCols(part.first, part.rank).cast<float>();
      }
      q.middleRows(h * (n + p), f.down.rows()) = f.down / a.scale;
      q.middleRows(h * (n + p) + n, p) = a.query[at].topRows(p) / a.scale;
    });
  }
  if (a.norm.present()) {
    store_normed(a.latent(), a.norm, out.branches.front());
  }
  out.q = linear_of(q);
  const MomentRef asked = query_moments.of(0);
  out.q_mean_square = asked.diagonal().head(asked.size() - 1).mean();
  out.o.weight = narrowed(a.o);
  if (!a.o_bias.isZero(0)) {
    out.o.bias = a.o_bias.transpose().cast<float>();
  }
  return out;
}

}  // namespace relatent
