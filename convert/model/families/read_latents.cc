#include "convert/model/families/read_latents.h"

#include <string>
#include <utility>

namespace relatent {
namespace {

// Brings the p rotary rows starting at `first` from interleaved pairs (2j, 2j+1) to halves (j, j + p/2).
template <typename Matrix>
void rows_to_halves(Matrix& m, Index first, Index p) {
  const Matrix pairs = m.middleRows(first, p);
  for (Index j = 0; j < p / 2; ++j) {
    m.row(first + j) = pairs.row(2 * j);
    m.row(first + j + p / 2) = pairs.row(2 * j + 1);
  }
}

// The up-projection of a single latent from its two halves: keys transposed per head, and values.
MatrixF up_of_halves(const LayerReader& in, const BranchGeometry& sizes) {
  const Index n = in.config().latent->qk_nope_head_dim;
  const Index w = in.config().latent->v_head_dim;
  const MatrixF k_b = in.matrix(Role::k_b_weight);  // [heads * rank, n]
  const MatrixF v_b = in.matrix(Role::v_b_weight);  // [heads * w, rank]
  MatrixF out(sizes.head_count * (n + w), sizes.rank);
  for (Index h = 0; h < sizes.head_count; ++h) {
    out.middleRows(h * (n + w), n) = k_b.middleRows(h * sizes.rank, sizes.rank).transpose();
    out.middleRows(h * (n + w) + n, w) = v_b.middleRows(h * w, w);
  }
  return out;
}

// What layers begin with: sizes, scale, query and output; branches and rotary key are left out.
LatentAttention read_query_and_output(const LayerReader& in) {
  const LatentGeometry& geometry = *in.config().latent;
  LatentAttention out;
  out.heads = in.config().num_attention_heads;
  out.nope_dim = geometry.qk_nope_head_dim;
  out.rope_dim = geometry.qk_rope_head_dim;
  out.v_dim = geometry.v_head_dim;
  out.scale = in.spec().scale;
  out.softcap = static_cast<float>(in.config().attn_logit_softcapping.value_or(0));
  if (geometry.normed_heads) {
    NormedHeads heads;
    heads.head_dim = geometry.normed_heads->head_dim;
    heads.q = in.linear(Role::normed_q_weight, Role::normed_q_bias);
    heads.q_norm = in.norm(Role::q_head_norm);
    heads.k = in.linear(Role::normed_k_weight, Role::normed_k_bias);
    heads.k_norm = in.norm(Role::k_head_norm);
    heads.v = in.linear(Role::normed_v_weight, Role::normed_v_bias);
    out.normed_heads = std::move(heads);
  }
  if (geometry.q_lora_rank) {
    out.q_down = in.linear(Role::q_a_weight, Role::q_a_bias);
    out.q_norm = in.latent_norm(Role::q_a_norm);
  }
  out.q = in.linear(Role::q_weight, Role::q_bias);
  out.q.weight *= static_cast<float>(geometry.query_scale);
  out.o = in.linear(Role::o_weight, Role::o_bias);
  out.rotary = in.rotary();
  return out;
}

// Brings rotary rows to halves, in the query and the rotary key, where the config says that they are
// interleaved.
void to_halves(const LayerReader& in, LatentAttention& attention) {
  if (!in.config().latent->rope_interleave) {
    return;
  }
  const Index n = attention.nope_dim;
  const Index p = attention.rope_dim;
  for (Index h = 0; h < attention.heads; ++h) {
    rows_to_halves(attention.q.weight, h * (n + p) + n, p);
  }
  Linear& key = attention.rotary_key;
  rows_to_halves(key.weight, 0, p);
  if (key.bias.size() > 0) {
    MatrixF column = key.bias.transpose();
    rows_to_halves(column, 0, p);
    key.bias = column.transpose();
  }
}

}  // namespace

LatentAttention read_joint_latents(const LayerReader& in) {
  const LatentGeometry& geometry = *in.config().latent;
  LatentAttention out = read_query_and_output(in);
  const Linear kv_a = in.linear(Role::kv_a_weight, Role::kv_a_bias);
  const bool several = geometry.branches.size() > 1;
  const bool stacked = several && in.has(Role::kv_b_weight);
  const MatrixF all_up = stacked ? in.matrix(Role::kv_b_weight) : MatrixF();
  Index first = 0;
  for (std::size_t b = 0; b < geometry.branches.size(); ++b) {
    const BranchGeometry& sizes = geometry.branches[b];
    const std::optional<Index> part = several ? std::optional(static_cast<Index>(b)) : std::nullopt;
    LatentBranch branch;
    branch.down = kv_a.rows(first, sizes.rank);
    branch.norm = in.latent_norm(Role::kv_a_norm, part);
    branch.first_head = sizes.first_head;
    branch.head_count = sizes.head_count;
    branch.up = stacked                    ? MatrixF(all_up.middleRows(first, sizes.rank).transpose())
                : in.has(Role::k_b_weight) ? up_of_halves(in, sizes)
                                           : in.matrix(Role::kv_b_weight, part);
    if (in.has(Role::kv_b_bias, part) && !in.matrix(Role::kv_b_bias, part).isZero(0)) {
      in.fail(Role::kv_b_bias, part, "holds a bias", "zeros", "other values",
              "latent attention here has none on its up-projections");
    }
    branch.up *= static_cast<float>(geometry.latent_scale);
    const Index step = out.nope_dim + out.v_dim;
    for (Index h = 0; h < branch.head_count && geometry.branch_scale != 1; ++h) {
      branch.up.middleRows(h * step + out.nope_dim, out.v_dim) *= static_cast<float>(geometry.branch_scale);
    }
    first += sizes.rank;
    out.branches.push_back(std::move(branch));
  }
  out.rotary_key = kv_a.rows(first, out.rope_dim);
  to_halves(in, out);
  return out;
}

LatentAttention read_branches(const LayerReader& in) {
  const LatentGeometry& geometry = *in.config().latent;
  LatentAttention out = read_query_and_output(in);
  out.rotary_key = in.linear(Role::k_rope_weight, Role::k_rope_bias);
  if (geometry.norm == LatentNorm::replicated) {
    out.norm_rows = in.matrix(Role::kv_norm_weight);
    out.norm_eps = static_cast<float>(geometry.norm_eps);
  }
  for (std::size_t s = 0; s < geometry.shared_ranks.size(); ++s) {
    out.shared.push_back(in.linear(Role::kv_shared_weight, Role::kv_shared_bias, static_cast<Index>(s)));
  }
  for (std::size_t b = 0; b < geometry.branches.size(); ++b) {
    const auto part = static_cast<Index>(b);
    const BranchGeometry& sizes = geometry.branches[b];
    LatentBranch branch;
    branch.down = in.linear(Role::kv_a_weight, Role::kv_a_bias, part);
    branch.shared = sizes.shared;
    branch.norm = in.latent_norm(Role::kv_a_norm, part);
    branch.up = in.matrix(Role::kv_b_weight, part);
    branch.first_head = sizes.first_head;
    branch.head_count = sizes.head_count;
    out.branches.push_back(std::move(branch));
  }
  to_halves(in, out);
  return out;
}

}  // namespace relatent
