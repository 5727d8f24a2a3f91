#include "convert/compute/cpu/fit_blocks.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <vector>

#include "linalg/decompose.h"
#include "linalg/layouts.h"

namespace relatent {
namespace {

// Queries of one head in a block: with the heads of a chunk enough for the BLAS, and few enough that little
// of a block lies after its queries.
constexpr Index block_rows = 32;
// Ridge of the preconditioners on the side of the scores.
constexpr double score_side_ridge = 1e-4;
// Heads whose curvature is held before it is added up.
constexpr Index curvature_heads = 16;

// Of those in a block, by one of its stacked rows.
Index keys_seen(const AttentionSample& sample, const Block& block, Index row) {
  return sample.position(block.sequence, block.first + (row % block.rows)) + 1;
}

// One head's part of key_curvature, on the rotary key and its group's latent: [p + rank, p + rank].
MatrixD head_curvature(const AttentionSample& sample, const AbsorbedAttention& attention,
                       const LatentGroup& group, Index h, double score_weight, double value_weight) {
  const auto at = static_cast<std::size_t>(h);
  const Index p = attention.rope_dim();
  const Index s = group.shared;
  const MatrixD& query = attention.query[at];
  MatrixD half(query.rows(), query.cols());
  half.noalias() = query * sample.asked_moment(h);
  const MatrixD energy = score_weight * (half * query.transpose());
  const double share = 1 / static_cast<double>(group.parts.size());
  MatrixD out = MatrixD::Zero(p + group.rank, p + group.rank);
  out.topLeftCorner(p, p) = energy.topLeftCorner(p, p);
  for (const LatentPart& part : group.parts) {
    const auto block = energy.block(part.query, part.query, group.width(part), group.width(part));
    const Index own = p + part.first;
    out.block(p, p, s, s) += share * block.topLeftCorner(s, s);
    out.block(own, own, part.rank, part.rank) += share * block.bottomRightCorner(part.rank, part.rank);
    out.block(p, own, s, part.rank) += share * block.topRightCorner(s, part.rank);
    out.block(own, p, part.rank, s) += share * block.bottomLeftCorner(part.rank, s);
  }
  const Index w = attention.v_dim();
  const MatrixD through = attention.o.middleCols(h * w, w) * attention.value_up[at];
  out.bottomRightCorner(group.rank, group.rank) += value_weight * (through.transpose() * through);
  return out;
}

}  // namespace

std::vector<Heads> head_chunks(Heads heads) {
  std::vector<Heads> out;
  for (Index i = 0; i < heads.count; i += chunk_heads) {
    out.push_back({heads.first + i, std::min(chunk_heads, heads.count - i)});
  }
  return out;
}

Index source_heads(const AttentionSample& sample) {
  return sample.source_query.cols() / sample.head_dim;
}

SampleRotations::SampleRotations(const Rotary& rotary, const AttentionSample& sample)
    : all(rotary, sample.length) {
  for (Index offset = 0; offset < std::min(sample.stride, sample.count); ++offset) {
    RotaryTable table;
    table.cos.resize(sample.per_sequence(), all.cos.cols());
    table.sin.resize(sample.per_sequence(), all.sin.cols());
    for (Index i = 0; i < sample.per_sequence(); ++i) {
      table.cos.row(i) = all.cos.row(sample.position(offset, i));
      table.sin.row(i) = all.sin.row(sample.position(offset, i));
    }
    sampled.push_back(std::move(table));
  }
}

RotaryTable reversed(RotaryTable table) {
  table.sin = -table.sin;
  return table;
}

MatrixF keys_of(const MatrixF& x, const MatrixF& key, const VectorF& shrink, const RotaryTable& table,
                Index p) {
  MatrixF z(x.rows(), key.rows());
  z.noalias() = x * key.transpose();
  if (shrink.size() > 0) {
    z.rightCols(z.cols() - p).array().colwise() *= shrink.array();
  }
  rotate_in_place(table, 0, p, 1, z);
  return z;
}

QueryMaps query_maps(const AttentionSample& sample, const Systems& queries, Index first_head, Heads heads) {
  const Heads mine{heads.first - first_head, heads.count};
  QueryMaps out{heads, queries[static_cast<std::size_t>(mine.first)].rows(), {}};
  if (!sample.by_head()) {
    out.maps.emplace_back(stacked(queries, mine), sample.compute);
    return out;
  }
  for (Index h = 0; h < heads.count; ++h) {
    // A head's own few inputs are not worth packing.
    out.maps.emplace_back(stacked(queries, {mine.first + h, 1}), DType::f32);
  }
  return out;
}

MatrixF queries_of(const AttentionSample& sample, Index sequence, const QueryMaps& queries,
                   const SampleRotations& rotations) {
  const Index rows = sample.per_sequence();
  MatrixF u(rows, queries.heads.count * queries.width);
  Index column = 0;
  for (std::size_t i = 0; i < queries.maps.size(); ++i) {
    const ProductMap& map = queries.maps[i];
    u.middleCols(column, map.out()) =
        map(sample.asked(queries.heads.first + static_cast<Index>(i), sequence * rows, rows));
    column += map.out();
  }
  rotate_in_place(rotations.of(sequence), 0, queries.width, queries.heads.count, u);
  return u;
}

MatrixF gather_keys(const MatrixF& z, const LatentGroup& group, const LatentPart& part, Index p,
                    Index first) {
  MatrixF out(z.rows(), p + group.width(part));
  out << z.leftCols(p), z.middleCols(p + first, group.shared),
      z.middleCols(p + first + part.first, part.rank);
  return out;
}

MatrixF gather_queries(const MatrixF& u, Index heads, const LatentGroup& group, const LatentPart& part,
                       Index p) {
  const Index width = u.cols() / heads;
  const Index content = group.width(part);
  MatrixF out(u.rows(), heads * (p + content));
  for (Index h = 0; h < heads; ++h) {
    out.middleCols(h * (p + content), p) = u.middleCols(h * width, p);
    out.middleCols(h * (p + content) + p, content) = u.middleCols(h * width + part.query, content);
  }
  return out;
}

void scatter_keys(const MatrixF& by_keys, const LatentGroup& group, const LatentPart& part, Index p,
                  MatrixF& sum) {
  sum.leftCols(p) += by_keys.leftCols(p);
  sum.middleCols(p, group.shared) += by_keys.middleCols(p, group.shared);
  sum.middleCols(p + part.first, part.rank) += by_keys.rightCols(part.rank);
}

void scatter_queries(const MatrixF& gradient, Index heads, const LatentGroup& group, const LatentPart& part,
                     Index p, MatrixF& sum) {
  const Index width = sum.cols() / heads;
  const Index content = group.width(part);
  for (Index h = 0; h < heads; ++h) {
    sum.middleCols(h * width, p) += gradient.middleCols(h * (p + content), p);
    sum.middleCols(h * width + part.query, content) += gradient.middleCols(h * (p + content) + p, content);
  }
}

MatrixF key_map_gradient(const AbsorbedAttention& attention, const std::vector<KeyGradient>& gradients,
                         const RotaryTable& table, const VectorF& shrink, const MatrixF& x) {
  const Index p = attention.rope_dim();
  MatrixF gradient = MatrixF::Zero(x.rows(), attention.width());
  for (const auto& [group, by_keys] : gradients) {
    gradient.leftCols(p) += by_keys->leftCols(p);
    gradient.middleCols(p + group->first, group->rank) += by_keys->rightCols(group->rank);
  }
  rotate_in_place(reversed(table), 0, p, 1, gradient);
  if (shrink.size() > 0) {
    gradient.rightCols(gradient.cols() - p).array().colwise() *= shrink.array();
  }
  MatrixF out(gradient.cols(), x.cols());
  out.noalias() = gradient.transpose() * x;
  return out;
}

MatrixF stacked(const Systems& maps, Heads heads) {
  const auto first = maps.begin() + heads.first;
  const Index width = first->rows();
  MatrixF out(heads.count * width, first->cols());
  for (Index h = 0; h < heads.count; ++h) {
    out.middleRows(h * width, width) = (first + h)->cast<float>();
  }
  return out;
}

std::vector<Block> blocks_of(const AttentionSample& sample, Index sequence) {
  std::vector<Block> out;
  for (Index first = 0; first < sample.per_sequence(); first += block_rows) {
    const Index rows = std::min(block_rows, sample.per_sequence() - first);
    out.push_back({sequence, first, rows, sample.position(sequence, first + rows - 1) + 1});
  }
  return out;
}

void stack_heads(const MatrixF& by_query, const Block& block, Index heads, MatrixF& out) {
  const Index width = by_query.cols() / heads;
  out.resize(heads * block.rows, width);
  for (Index h = 0; h < heads; ++h) {
    out.middleRows(h * block.rows, block.rows) = by_query.block(block.first, h * width, block.rows, width);
  }
}

void unstack_heads(const MatrixF& stack, const Block& block, Index heads, MatrixF& by_query) {
  const Index width = stack.cols();
  for (Index h = 0; h < heads; ++h) {
    by_query.block(block.first, h * width, block.rows, width) = stack.middleRows(h * block.rows, block.rows);
  }
}

void source_logits(const AttentionSample& sample, const Block& block, Heads heads, MatrixF& logits) {
  const Index d = sample.head_dim;
  logits.resize(heads.count * block.rows, block.columns);
  for (Index i = 0; i < heads.count; ++i) {
    const Index head = heads.first + i;
    logits.middleRows(i * block.rows, block.rows).noalias() =
        sample.source_query.block(block.sequence * sample.per_sequence() + block.first, head * d, block.rows,
                                  d) *
        sample.source_key
            .block(block.sequence * sample.length, head / sample.group_size * d, block.columns, d)
            .transpose();
  }
}

void causal_softmax(const AttentionSample& sample, const Block& block, MatrixF& scores) {
  for (Index i = 0; i < scores.rows(); ++i) {
    const Index seen = keys_seen(sample, block, i);
    auto row = scores.row(i).head(seen).array();
    row = (row - row.maxCoeff()).exp();
    row *= 1.0F / row.sum();
    scores.row(i).tail(scores.cols() - seen).setZero();
  }
}

void form_weights(const AttentionSample& sample, const Block& block, Heads heads, MatrixF& weights) {
  source_logits(sample, block, heads, weights);
  for (Index i = 0; sample.softcap > 0 && i < weights.rows(); ++i) {
    auto row = weights.row(i).head(keys_seen(sample, block, i)).array();
    row = sample.softcap * (row / sample.softcap).tanh();
  }
  causal_softmax(sample, block, weights);
}

Eigen::Ref<const MatrixF> source_weights(const AttentionSample& sample, const Block& block, Heads heads,
                                         MatrixF& scratch) {
  if (sample.weights.empty()) {
    form_weights(sample, block, heads, scratch);
    return scratch;
  }
  return sample
      .weights[static_cast<std::size_t>(block.sequence)][static_cast<std::size_t>(block.first / block_rows)]
      .middleRows(heads.first * block.rows, heads.count * block.rows);
}

double centre(const Eigen::Ref<const MatrixF>& weights, Eigen::Ref<MatrixF> scores) {
  double variance = 0;
  for (Index i = 0; i < scores.rows(); ++i) {
    const auto w = weights.row(i).array();
    auto s = scores.row(i).array();
    s -= (w * s).sum();
    variance += static_cast<double>((w * s * s).sum());
    s *= w;
  }
  return variance;
}

ScoreSide score_side(MatrixD moment) {
  const double mean = moment.diagonal().mean();
  // What says nothing (all zero) needs no step; any positive number keeps the inverse finite.
  moment.diagonal().array() += mean > 0 ? score_side_ridge * mean : 1;
  MatrixD inverse = positive_inverse(moment);
  return {std::move(moment), std::move(inverse)};
}

ProductMap input_side(const MatrixD& moment, double added, DType compute) {
  MatrixD raised = moment;
  raised.diagonal().array() += added;
  return {narrowed(positive_inverse(std::move(raised))), compute};
}

Systems precondition(const std::vector<ScoreSide>& scores, const Systems& residual,
                     const std::function<const ProductMap&(std::size_t)>& inputs) {
  Systems out;
  for (const MatrixD& m : residual) {
    out.emplace_back(m.rows(), m.cols());
  }
  for_slices(residual, [&](std::size_t i, Index first, Index rows) {
    const MatrixD half = scores[i].inverse.middleRows(first, rows) * residual[i];
    copy_tiled(inputs(i)(narrowed(half)), out[i].middleRows(first, rows));
  });
  return out;
}

void add_ridge(const std::vector<ScoreSide>& scores, std::span<const double> ridges, const Systems& direction,
               Systems& image) {
  for_slices(image, [&](std::size_t i, Index first, Index rows) {
    image[i].middleRows(first, rows).noalias() +=
        ridges[ridges.size() > 1 ? i : 0] * (scores[i].moment.middleRows(first, rows) * direction[i]);
  });
}

MatrixD key_curvature(const AttentionSample& sample, const AbsorbedAttention& attention,
                      const VectorD& score_weight, const VectorD& value_weight) {
  const Index p = attention.rope_dim();
  MatrixD out = MatrixD::Zero(attention.width(), attention.width());
  for (const LatentGroup& group : attention.groups) {
    in_batches<MatrixD>(
        group.head_count, 1, curvature_heads,
        [&](Index i, Index, MatrixD& slot) {
          const Index h = group.first_head + i;
          slot = head_curvature(sample, attention, group, h, score_weight(h), value_weight(h));
        },
        [&](Index, const std::vector<MatrixD>& slots) {
          const Index first = p + group.first;
          for (const MatrixD& slot : slots) {
            out.topLeftCorner(p, p) += slot.topLeftCorner(p, p);
            out.block(first, first, group.rank, group.rank) += slot.bottomRightCorner(group.rank, group.rank);
          }
        });
  }
  average_pairs(out, p);
  return out;
}

void average_pairs(MatrixD& moment, Index p) {
  const VectorD diagonal = moment.diagonal().head(p);
  moment.topRows(p).setZero();
  moment.leftCols(p).setZero();
  for (Index j = 0; j < p / 2; ++j) {
    const double mean = 0.5 * (diagonal(j) + diagonal(j + p / 2));
    moment(j, j) = mean;
    moment(j + p / 2, j + p / 2) = mean;
  }
}

}  // namespace relatent
