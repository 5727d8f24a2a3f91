// Random layers of the partitioned forms, and what their shape says.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "convert/forms/form.h"
#include "convert/latent/lay_out.h"
#include "tests/support/reference.h"
#include "tests/support/samples.h"

namespace relatent::testing_support {

// No two sizes are equal, so that none can be taken for another.
struct LatentSample {
  std::string name;
  std::string form = "tpla";
  Index branches = 2;
  Index heads = 6;
  Index key_rank = 3;
  Index rank = 11;  // of the first group; each later one has one more
  Index nope_dim = 5;
  bool bias = false;
  LatentNorm norm = LatentNorm::none;
  std::optional<Index> q_rank = {};
};

inline std::vector<LatentSample> latent_samples() {
  return {{.name = "mla", .form = "mla", .branches = 1},
          {.name = "mla, heads divide", .form = "mla", .branches = 1, .heads = 8, .bias = true},
          {.name = "gla 2", .form = "gla", .branches = 2, .heads = 8, .bias = true},
          {.name = "gla 4, uneven heads", .form = "gla", .branches = 4, .norm = LatentNorm::branch},
          {.name = "gla 3, branch norm", .form = "gla", .branches = 3, .norm = LatentNorm::branch},
          {.name = "tpla 2", .norm = LatentNorm::replicated, .q_rank = 9},
          {.name = "tpla 2, nothing shared", .key_rank = 0, .bias = true},
          {.name = "tpla 4", .branches = 4, .heads = 8, .bias = true, .norm = LatentNorm::replicated},
          {.name = "tpla 4, branch norm", .branches = 4, .norm = LatentNorm::branch, .q_rank = 9},
          {.name = "tpla 2, no content", .nope_dim = 0, .bias = true, .q_rank = 9},
          {.name = "mlra 2", .form = "mlra", .heads = 8, .bias = true},
          {.name = "mlra 2, uneven heads", .form = "mlra", .heads = 5, .norm = LatentNorm::replicated},
          {.name = "mlra 4", .form = "mlra", .branches = 4, .heads = 4, .norm = LatentNorm::branch}};
}

inline Partition partition_of(const LatentSample& sample) {
  return relatent::partition_of(sample.form, sample.branches).value();
}

inline LatentShape shape_of(const LatentSample& sample) {
  LatentShape out;
  out.form = sample.form;
  out.heads = sample.heads;
  out.qk_nope_head_dim = sample.nope_dim;
  out.qk_rope_head_dim = 6;
  out.v_head_dim = 7;
  out.q_lora_rank = sample.q_rank;
  out.has_q_bias = sample.bias;
  out.attention_bias = sample.bias;
  const Partition partition = partition_of(sample);
  std::vector<GroupSizes> groups;
  for (Index g = 0; g < partition.groups; ++g) {
    groups.push_back({sample.key_rank, sample.rank + g});
  }
  lay_out(partition, groups, out);
  out.norm = sample.norm;
  out.norm_rank = sample.norm == LatentNorm::replicated ? 10 : 0;
  return out;
}

inline RowVectorF random_gain(Random& random, Index size) {
  return random.row(size, 0.3).array() + 1.0F;
}

inline LatentAttention random_latent(Random& random, const LatentSample& sample, Index hidden) {
  constexpr float eps = 1e-6F;
  const LatentShape shape = shape_of(sample);
  LatentAttention out;
  out.heads = shape.heads;
  out.nope_dim = shape.qk_nope_head_dim;
  out.rope_dim = shape.qk_rope_head_dim;
  out.v_dim = shape.v_head_dim;
  // Not what an engine would take by itself.
  out.scale = 0.4F;
  if (shape.q_lora_rank) {
    out.q_down = random.linear(*shape.q_lora_rank, hidden, sample.bias);
    out.q_norm = {random_gain(random, *shape.q_lora_rank), eps};
  }
  out.q = random.linear(out.heads * (out.nope_dim + out.rope_dim), shape.q_lora_rank.value_or(hidden),
                        sample.bias && !shape.q_lora_rank);
  out.rotary_key = random.linear(out.rope_dim, hidden, sample.bias);
  for (const Index rank : shape.shared_ranks) {
    out.shared.push_back(random.linear(rank, hidden, sample.bias));
  }
  if (shape.norm == LatentNorm::replicated) {
    out.norm_rows = random.matrix(shape.norm_rank, hidden, 0.3);
    out.norm_eps = eps;
  }
  for (const BranchGeometry& geometry : shape.branches) {
    const Index rank = geometry.whole_rank(shape.shared_ranks);
    LatentBranch branch;
    branch.down = random.linear(geometry.rank, hidden, sample.bias);
    branch.shared = geometry.shared;
    if (shape.norm == LatentNorm::branch) {
      branch.norm = {random_gain(random, rank), eps};
    }
    branch.up = random.matrix(geometry.head_count * (out.nope_dim + out.v_dim), rank,
                              1 / std::sqrt(static_cast<double>(rank)));
    branch.first_head = geometry.first_head;
    branch.head_count = geometry.head_count;
    out.branches.push_back(std::move(branch));
  }
  out.o = random.linear(hidden, out.heads * out.v_dim, sample.bias);
  out.rotary = sample_rotary(out.rope_dim, 1.25F);
  return out;
}

// The layer's part of the residual stream, in double precision.
inline MatrixD output_by_the_book(const LatentAttention& a, const MatrixF& x) {
  MatrixD out = mix_by_the_book(a, x) * a.o.weight.cast<double>().transpose();
  if (a.o.bias.size() > 0) {
    out.rowwise() += a.o.bias.cast<double>();
  }
  return out;
}

}  // namespace relatent::testing_support
