#include "convert/latent/attention_fit.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <vector>

#include "linalg/decompose.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Queries handled at once, those of all heads together, and how many positions of one head they may span:
// enough for the BLAS, few enough that little of a block lies after its queries.
constexpr Index block_queries = 128;
constexpr Index least_block_rows = 4;
constexpr Index most_block_rows = 32;
// Sequences whose contributions are held before they are added up, one after the other.
constexpr Index batch_sequences = 8;
// Doubles that each vector of one conjugate-gradient run may take; heads are fitted in runs of that size.
constexpr Index run_doubles = Index{1} << 24;
// Ridge of the preconditioners on the side of the scores.
constexpr double score_side_ridge = 1e-4;
// Every how many-th sequence tells how keys and values vary, which only weighs and preconditions.
constexpr Index moment_sequences = 4;
// The keys are fitted on every second sequence where that leaves so many queries for each unknown: all heads
// share them, so they see more queries.
constexpr Index key_sequences = 2;
constexpr Index key_queries_per_unknown = 4;
// Conjugate-gradient steps of the queries while keys are still to change.
constexpr Index passing_steps = 1;

// Conjugate gradients on one or several independent systems A(X) = B, preconditioned, from X = 0. Every
// vector is a list of matrices, one for each system.
using Systems = std::vector<MatrixD>;

struct Solution {
  Systems x;
  std::vector<double> gain;  // by how much xᵀAx - 2 bᵀx fell
};

template <typename Apply, typename Precondition>
Solution conjugate_gradients(Systems residual, Index steps, const Apply& apply,
                             const Precondition& precondition) {
  const std::size_t count = residual.size();
  Solution out{{}, std::vector<double>(count, 0)};
  Systems direction(count);
  std::vector<double> rz(count);
  parallel_for(count, [&](std::size_t i) { direction[i] = precondition(residual[i], i); });
  for (std::size_t i = 0; i < count; ++i) {
    out.x.emplace_back(MatrixD::Zero(residual[i].rows(), residual[i].cols()));
    rz[i] = residual[i].cwiseProduct(direction[i]).sum();
  }
  for (Index step = 0; step < steps; ++step) {
    const Systems image = apply(direction);
    parallel_for(count, [&](std::size_t i) {
      const double curvature = direction[i].cwiseProduct(image[i]).sum();
      if (!(curvature > 0) || !(rz[i] > 0)) {
        return;  // solved, or nothing to solve
      }
      const double alpha = rz[i] / curvature;
      out.x[i] += alpha * direction[i];
      out.gain[i] += alpha * rz[i];
      if (step + 1 < steps) {
        residual[i] -= alpha * image[i];
        const MatrixD next = precondition(residual[i], i);
        const double next_rz = residual[i].cwiseProduct(next).sum();
        direction[i] = next + (next_rz / rz[i]) * direction[i];
        rz[i] = next_rz;
      }
    });
  }
  return out;
}

// A symmetric moment with its ridge inside, and the inverse of that.
struct Side {
  MatrixD moment;
  MatrixD inverse;
};

Side regularised(MatrixD moment, double added) {
  moment.diagonal().array() += added;
  const Index n = moment.rows();
  MatrixD inverse = ridge_solve(moment, MatrixD::Identity(n, n), 0);
  return {std::move(moment), std::move(inverse)};
}

Side score_side(MatrixD moment) {
  const double mean = moment.diagonal().mean();
  // What says nothing (all zero) needs no step; any positive number keeps the inverse finite.
  return regularised(std::move(moment), mean > 0 ? score_side_ridge * mean : 1);
}

double mean_square(const MatrixD& input_moment) {
  return input_moment.diagonal().head(input_moment.rows() - 1).mean();
}

// The coordinates of a pair turn into one another, so they weigh the same, and none correlates with the
// latent once the pair has turned.
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

RotaryTable reversed(RotaryTable table) {
  table.sin = -table.sin;
  return table;
}

// Rotations of all positions, and of the sampled ones for each offset at which a sequence may start.
struct Turns {
  RotaryTable all;
  std::vector<RotaryTable> sampled;

  Turns(const Rotary& rotary, const AttentionSample& sample) : all(rotary, sample.length) {
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
  const RotaryTable& of(Index sequence) const {
    return sampled[static_cast<std::size_t>(sequence) % sampled.size()];
  }
};

MatrixF apply_map(const Eigen::Ref<const MatrixF>& x, const MatrixF& map) {
  MatrixF out(x.rows(), map.rows());
  out.noalias() = x * map.transpose();
  return out;
}

// z of one sequence: [length, p + latent]. `shrink`, when not empty, multiplies the latent of every token.
MatrixF keys_of(const MatrixF& x, const MatrixF& key, const VectorF& shrink, const RotaryTable& table,
                Index p) {
  MatrixF z = apply_map(x, key);
  if (shrink.size() > 0) {
    z.rightCols(z.cols() - p).array().colwise() *= shrink.array();
  }
  rotate_in_place(table, 0, p, 1, z);
  return z;
}

// The key map as a group reads it: rotary rows, then its latent's.
MatrixF key_map(const AbsorbedAttention& attention, const LatentGroup& group) {
  MatrixF out(attention.rope_dim() + group.rank, attention.key.cols());
  out << attention.key.topRows(attention.rope_dim()).cast<float>(), attention.latent_of(group).cast<float>();
  return out;
}

// Columns of z that the scores of a part read; the group's latent starts `first` columns after the rotary
// key.
MatrixF gather_keys(const MatrixF& z, const LatentGroup& group, const LatentPart& part, Index p,
                    Index first) {
  MatrixF out(z.rows(), p + group.width(part));
  out << z.leftCols(p), z.middleCols(p + first, group.shared),
      z.middleCols(p + first + part.first, part.rank);
  return out;
}

// Rows of several heads' queries that belong to a part: [rows, heads * (p + shared + part)].
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

// Adds what pulls on a part's queries to the pull on the heads' whole queries.
void scatter_queries(const MatrixF& pull, Index heads, const LatentGroup& group, const LatentPart& part,
                     Index p, MatrixF& sum) {
  const Index width = sum.cols() / heads;
  const Index content = group.width(part);
  for (Index h = 0; h < heads; ++h) {
    sum.middleCols(h * width, p) += pull.middleCols(h * (p + content), p);
    sum.middleCols(h * width + part.query, content) += pull.middleCols(h * (p + content) + p, content);
  }
}

std::vector<MatrixF> all_keys(const AttentionSample& sample, const AbsorbedAttention& attention,
                              const LatentGroup& group, const RotaryTable& table) {
  const MatrixF key = key_map(attention, group);
  std::vector<MatrixF> out(static_cast<std::size_t>(sample.count));
  parallel_for(out.size(), [&](std::size_t s) {
    const MatrixF x = sample.inputs(static_cast<Index>(s));
    out[s] = keys_of(x, key, latent_shrink(attention, x), table, attention.rope_dim());
  });
  return out;
}

// The maps of several heads, one under the other.
MatrixF stacked(const Systems& maps) {
  const Index width = maps.front().rows();
  MatrixF out(static_cast<Index>(maps.size()) * width, maps.front().cols());
  for (std::size_t h = 0; h < maps.size(); ++h) {
    out.middleRows(static_cast<Index>(h) * width, width) = maps[h].cast<float>();
  }
  return out;
}

std::vector<MatrixF> single(const Systems& maps) {
  std::vector<MatrixF> out;
  for (const MatrixD& map : maps) {
    out.emplace_back(map.cast<float>());
  }
  return out;
}

// u of one sequence's sampled rows for all stacked heads: [per_sequence, heads * width].
MatrixF queries_of(const AttentionSample& sample, Index sequence, const MatrixF& map, Index width,
                   const Turns& turns) {
  const Index rows = sample.per_sequence();
  MatrixF u = apply_map(sample.query_inputs.middleRows(sequence * rows, rows), map);
  rotate_in_place(turns.of(sequence), 0, width, map.rows() / width, u);
  return u;
}

Index source_heads(const AttentionSample& sample) {
  return sample.source_query.cols() / sample.head_dim;
}

Index block_rows(const AttentionSample& sample) {
  return std::clamp(block_queries / source_heads(sample), least_block_rows, most_block_rows);
}

// Some of one sequence's sampled queries. What belongs to several heads is stacked by head: row h rows + i of
// such a matrix is query first + i of the h-th of them, so that one product serves all heads of a block.
struct Block {
  Index sequence;
  Index first;
  Index rows;
  Index columns;  // keys that the last of them sees
};

template <typename Body>
void for_blocks(const AttentionSample& sample, Index sequence, const Body& body) {
  const Index step = block_rows(sample);
  for (Index first = 0; first < sample.per_sequence(); first += step) {
    const Index rows = std::min(step, sample.per_sequence() - first);
    body(Block{sequence, first, rows, sample.position(sequence, first + rows - 1) + 1});
  }
}

// by_query [queries, heads * w] -> [heads * rows, w].
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

// Logits of stacked heads to causal softmax weights.
void softmax_rows(const AttentionSample& sample, const Block& block, MatrixF& logits) {
  for (Index i = 0; i < logits.rows(); ++i) {
    const Index seen = sample.position(block.sequence, block.first + (i % block.rows)) + 1;
    auto row = logits.row(i).head(seen).array();
    row = (row - row.maxCoeff()).exp();
    row *= 1.0F / row.sum();
    logits.row(i).tail(logits.cols() - seen).setZero();
  }
}

struct Heads {
  Index first;
  Index count;
};

// The source's logits, [heads * rows, columns].
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

// Their softmax: kept by the sample, or formed in scratch. One thread at a time asks for a sequence.
Eigen::Ref<const MatrixF> source_weights(const AttentionSample& sample, const Block& block, Heads heads,
                                         MatrixF& scratch) {
  if (sample.weights.empty()) {
    source_logits(sample, block, heads, scratch);
    softmax_rows(sample, block, scratch);
    return scratch;
  }
  std::vector<MatrixF>& kept = sample.weights[static_cast<std::size_t>(block.sequence)];
  const Index step = block_rows(sample);
  kept.resize(static_cast<std::size_t>((sample.per_sequence() + step - 1) / step));
  MatrixF& weights = kept[static_cast<std::size_t>(block.first / step)];
  if (weights.size() == 0) {
    source_logits(sample, block, {0, source_heads(sample)}, weights);
    softmax_rows(sample, block, weights);
  }
  return weights.middleRows(heads.first * block.rows, heads.count * block.rows);
}

// scores -> weights ∘ (scores - Σ weights scores); returns Σ weights (scores - mean)².
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

// Calls piece(sequence, slot) in parallel and then add(slot, of the same sequence) one after the other.
template <typename Slot, typename Piece, typename Add>
void in_batches(Index count, const Piece& piece, const Add& add) {
  for (Index first = 0; first < count; first += batch_sequences) {
    std::vector<Slot> slots(static_cast<std::size_t>(std::min(batch_sequences, count - first)));
    parallel_for(slots.size(), [&](std::size_t i) { piece(first + static_cast<Index>(i), slots[i]); });
    add(first, slots);
  }
}

// How many of `count` sequences are left when only every step-th is taken.
Index every(Index count, Index step) {
  return (count + step - 1) / step;
}

Index key_step(const AttentionSample& sample) {
  const Index queries = every(sample.count, key_sequences) * sample.per_sequence();
  return queries >= key_queries_per_unknown * sample.sampled_inputs.cols() ? key_sequences : 1;
}

double scarcity(const AttentionSample& sample) {
  return 1 + 8 * static_cast<double>(sample.sampled_inputs.cols()) /
                 static_cast<double>(sample.sampled_inputs.rows());
}

// The score errors of a run of heads as a function of their queries.
class QueryProblem {
 public:
  // keys: z of the group per sequence.
  QueryProblem(const AttentionSample& sample, const AbsorbedAttention& attention, const LatentGroup& group,
               const Turns& turns, const std::vector<MatrixF>& keys, Heads heads)
      : sample_(sample),
        group_(group),
        turns_(turns),
        keys_(keys),
        heads_(heads),
        p_(attention.rope_dim()),
        width_(attention.query[static_cast<std::size_t>(heads.first)].rows()) {}

  struct Start {
    Systems residual;
    std::vector<MatrixD> key_moment;  // per head: within-query covariance of what its rows read, by parts
    std::vector<double> error;        // J_h, the mean over parts
  };

  // Where the given queries fall short of the source.
  Start start(const Systems& queries) const {
    Start out;
    out.residual = zeros(queries);
    out.key_moment.assign(queries.size(), MatrixD::Zero(width_, width_));
    out.error.assign(queries.size(), 0);
    const MatrixF map = stacked(queries);
    in_batches<Slot>(
        sample_.count, [&](Index s, Slot& slot) { run(s, map, true, slot); },
        [&](Index first, const std::vector<Slot>& slots) {
          add(first, slots, out.residual);
          for (const Slot& slot : slots) {
            for (std::size_t h = 0; h < queries.size(); ++h) {
              out.error[h] += slot.error[h];
              if (!slot.key_moment.empty()) {
                out.key_moment[h] += slot.key_moment[h].cast<double>();
              }
            }
          }
        });
    const auto moment_rows =
        static_cast<double>(every(sample_.count, moment_sequences) * sample_.per_sequence());
    for (std::size_t h = 0; h < queries.size(); ++h) {
      out.residual[h] /= rows();
      out.key_moment[h] /= moment_rows;
      out.error[h] /= rows();
      average_pairs(out.key_moment[h], p_);
    }
    return out;
  }

  // The quadratic's matrix times a direction.
  Systems apply(const Systems& direction) const {
    Systems out = zeros(direction);
    const MatrixF map = stacked(direction);
    in_batches<Slot>(
        sample_.count, [&](Index s, Slot& slot) { run(s, map, false, slot); },
        [&](Index first, const std::vector<Slot>& slots) { add(first, slots, out); });
    for (MatrixD& m : out) {
      m /= rows();
    }
    return out;
  }

 private:
  struct Slot {
    MatrixF
        pull;  // [per_sequence, heads * width]: Σ_n P_mn error_mn z_n, in the frame of the unrotated query
    std::vector<MatrixF> key_moment;
    std::vector<double> error;
  };

  double rows() const { return static_cast<double>(sample_.query_inputs.rows()); }

  static Systems zeros(const Systems& like) {
    Systems out;
    for (const MatrixD& m : like) {
      out.emplace_back(MatrixD::Zero(m.rows(), m.cols()));
    }
    return out;
  }

  void run(Index s, const MatrixF& map, bool against_source, Slot& slot) const {
    const MatrixF u = queries_of(sample_, s, map, width_, turns_);
    const MatrixF& z = keys_[static_cast<std::size_t>(s)];
    const Index heads = heads_.count;
    const auto share = 1.0F / static_cast<float>(group_.parts.size());
    slot.pull = MatrixF::Zero(u.rows(), u.cols());
    slot.error.assign(static_cast<std::size_t>(heads), 0);
    const bool wants_moment = against_source && s % moment_sequences == 0;
    slot.key_moment.assign(static_cast<std::size_t>(wants_moment ? heads : 0), MatrixF::Zero(width_, width_));
    for (const LatentPart& part : group_.parts) {
      const Index width = p_ + group_.width(part);
      const MatrixF queries = gather_queries(u, heads, group_, part, p_);
      const MatrixF keys = gather_keys(z, group_, part, p_, 0);
      MatrixF pull(queries.rows(), queries.cols());
      MatrixF received = MatrixF::Zero(wants_moment ? heads : 0, sample_.length);
      MatrixF mean_keys(wants_moment ? queries.rows() : 0, queries.cols());
      MatrixF logits;
      MatrixF scratch;
      MatrixF scores;
      MatrixF stack;
      for_blocks(sample_, s, [&](const Block& block) {
        const auto weights = source_weights(sample_, block, heads_, scratch);
        const auto seen = keys.topRows(block.columns);
        stack_heads(queries, block, heads, stack);
        scores.resize(stack.rows(), block.columns);
        scores.noalias() = stack * seen.transpose();
        if (against_source) {
          source_logits(sample_, block, heads_, logits);
          scores = logits - scores;
        }
        if (wants_moment) {
          stack.noalias() = weights * seen;
          unstack_heads(stack, block, heads, mean_keys);
        }
        for (Index h = 0; h < heads; ++h) {
          const auto of_head = weights.middleRows(h * block.rows, block.rows);
          slot.error[static_cast<std::size_t>(h)] +=
              static_cast<double>(share) * centre(of_head, scores.middleRows(h * block.rows, block.rows));
          if (wants_moment) {
            received.row(h).head(block.columns) += of_head.colwise().sum();
          }
        }
        stack.noalias() = scores * seen;
        unstack_heads(stack, block, heads, pull);
      });
      for (Index h = 0; h < received.rows(); ++h) {
        const MatrixF scaled = received.row(h).transpose().cwiseSqrt().asDiagonal() * keys;
        const auto means = mean_keys.middleCols(h * width, width);
        MatrixF moment(width, width);
        moment.noalias() = scaled.transpose() * scaled;
        moment.noalias() -= means.transpose() * means;
        MatrixF& whole = slot.key_moment[static_cast<std::size_t>(h)];
        whole.topLeftCorner(p_, p_) += share * moment.topLeftCorner(p_, p_);
        whole.block(part.query, part.query, width - p_, width - p_) =
            share * moment.bottomRightCorner(width - p_, width - p_);
      }
      pull *= share;
      scatter_queries(pull, heads, group_, part, p_, slot.pull);
    }
    rotate_in_place(reversed(turns_.of(s)), 0, width_, heads, slot.pull);
  }

  void add(Index first_sequence, const std::vector<Slot>& slots, Systems& sum) const {
    const Index rows = sample_.per_sequence();
    parallel_for(sum.size(), [&](std::size_t h) {
      MatrixF product(width_, sample_.query_inputs.cols());
      for (std::size_t i = 0; i < slots.size(); ++i) {
        product.noalias() =
            slots[i].pull.middleCols(static_cast<Index>(h) * width_, width_).transpose() *
            sample_.query_inputs.middleRows((first_sequence + static_cast<Index>(i)) * rows, rows);
        sum[h] += product.cast<double>();
      }
    });
  }

  const AttentionSample& sample_;
  const LatentGroup& group_;
  const Turns& turns_;
  const std::vector<MatrixF>& keys_;
  Heads heads_;
  Index p_;
  Index width_;
};

// Errors of the scores and of the output as a function of the key map.
class KeyProblem {
 public:
  KeyProblem(const AttentionSample& sample, const AbsorbedAttention& attention, const Turns& turns,
             double score_weight)
      : sample_(sample),
        attention_(attention),
        turns_(turns),
        o_(attention.o.cast<float>()),
        weight_((score_weight * sample.value_spread).cast<float>()),
        value_up_(single(attention.value_up)) {
    for (const LatentGroup& group : attention.groups) {
      const auto first = attention.query.begin() + group.first_head;
      query_.push_back(stacked({first, first + group.head_count}));
    }
  }

  MatrixD residual(const MatrixD& key) const { return run(key, true); }
  MatrixD apply(const MatrixD& direction) const { return run(direction, false); }

  // Σ_h weight_h E[u uᵀ] + value_upᵀ Oᵀ O value_up, [p + r, p + r]: the curvature seen by one token's key.
  MatrixD score_moment() const {
    const Index width = attention_.width();
    const Index p = attention_.rope_dim();
    MatrixD out = MatrixD::Zero(width, width);
    for (const LatentGroup& group : attention_.groups) {
      const Index first = p + group.first;
      for (Index h = group.first_head; h < group.first_head + group.head_count; ++h) {
        const auto at = static_cast<std::size_t>(h);
        const MatrixD& query = attention_.query[at];
        const MatrixD energy =
            static_cast<double>(weight_(h)) * (query * sample_.query_moment * query.transpose());
        const double share = 1 / static_cast<double>(group.parts.size());
        out.topLeftCorner(p, p) += energy.topLeftCorner(p, p);
        for (const LatentPart& part : group.parts) {
          const auto block = energy.block(part.query, part.query, group.width(part), group.width(part));
          const Index own = p + group.first + part.first;
          const Index s = group.shared;
          out.block(first, first, s, s) += share * block.topLeftCorner(s, s);
          out.block(own, own, part.rank, part.rank) += share * block.bottomRightCorner(part.rank, part.rank);
          out.block(first, own, s, part.rank) += share * block.topRightCorner(s, part.rank);
          out.block(own, first, part.rank, s) += share * block.bottomLeftCorner(part.rank, s);
        }
        const Index w = attention_.v_dim();
        const MatrixD through = attention_.o.middleCols(h * w, w) * attention_.value_up[at];
        out.block(first, first, group.rank, group.rank) += through.transpose() * through;
      }
    }
    average_pairs(out, p);
    return out;
  }

 private:
  MatrixD run(const MatrixD& key, bool against_source) const {
    MatrixD sum = MatrixD::Zero(key.rows(), key.cols());
    const MatrixF map = key.cast<float>();
    const Index step = key_step(sample_);
    in_batches<MatrixF>(
        every(sample_.count, step),
        [&](Index s, MatrixF& slot) { slot = run(s * step, map, against_source); },
        [&](Index, const std::vector<MatrixF>& slots) {
          for (const MatrixF& slot : slots) {
            sum += slot.cast<double>();
          }
        });
    return sum / static_cast<double>(every(sample_.count, step) * sample_.per_sequence());
  }

  MatrixF run(Index s, const MatrixF& map, bool against_source) const {
    const Index p = attention_.rope_dim();
    const Index width = attention_.width();
    const Index w = attention_.v_dim();
    const Index rows = sample_.per_sequence();
    const MatrixF x = sample_.inputs(s);
    const VectorF shrink = latent_shrink(attention_, x);
    const MatrixF z = keys_of(x, map, shrink, turns_.all, p);
    MatrixF pull = MatrixF::Zero(z.rows(), width);
    MatrixF mixed(rows, attention_.heads() * w);
    MatrixF logits;
    MatrixF scores;
    MatrixF queries;
    MatrixF latent;  // stacked: what the heads read, then what they should
    MatrixF scratch;
    for (std::size_t g = 0; g < attention_.groups.size(); ++g) {
      const LatentGroup& group = attention_.groups[g];
      const Heads heads{group.first_head, group.head_count};
      const auto share = 1.0F / static_cast<float>(group.parts.size());
      const MatrixF whole = queries_of(sample_, s, query_[g], query_[g].rows() / heads.count, turns_);
      std::vector<MatrixF> keys;
      std::vector<MatrixF> asked;
      std::vector<MatrixF> key_pull;
      for (const LatentPart& part : group.parts) {
        keys.push_back(gather_keys(z, group, part, p, group.first));
        asked.push_back(gather_queries(whole, heads.count, group, part, p));
        key_pull.emplace_back(MatrixF::Zero(z.rows(), keys.back().cols()));
      }
      for_blocks(sample_, s, [&](const Block& block) {
        const auto weights = source_weights(sample_, block, heads, scratch);
        if (against_source) {
          source_logits(sample_, block, heads, logits);
        }
        for (std::size_t b = 0; b < keys.size(); ++b) {
          const auto seen = keys[b].topRows(block.columns);
          stack_heads(asked[b], block, heads.count, queries);
          scores.resize(queries.rows(), block.columns);
          scores.noalias() = queries * seen.transpose();
          if (against_source) {
            scores = logits - scores;
          }
          for (Index i = 0; i < heads.count; ++i) {
            auto of_head = scores.middleRows(i * block.rows, block.rows);
            centre(weights.middleRows(i * block.rows, block.rows), of_head);
            of_head *= share * weight_(heads.first + i);
          }
          key_pull[b].topRows(block.columns).noalias() += scores.transpose() * queries;
        }
        latent.resize(heads.count * block.rows, group.rank);
        latent.noalias() = weights * z.block(0, p + group.first, block.columns, group.rank);
        for (Index i = 0; i < heads.count; ++i) {
          const Index h = heads.first + i;
          mixed.block(block.first, h * w, block.rows, w).noalias() =
              latent.middleRows(i * block.rows, block.rows) *
              value_up_[static_cast<std::size_t>(h)].transpose();
        }
      });
      for (std::size_t b = 0; b < keys.size(); ++b) {
        const LatentPart& part = group.parts[b];
        pull.leftCols(p) += key_pull[b].leftCols(p);
        pull.middleCols(p + group.first, group.shared) += key_pull[b].middleCols(p, group.shared);
        pull.middleCols(p + group.first + part.first, part.rank) += key_pull[b].rightCols(part.rank);
      }
    }
    MatrixF output = apply_map(mixed, o_);
    if (against_source) {
      output = sample_.target.middleRows(s * rows, rows) - output;
      output.rowwise() -= attention_.o_bias.transpose().cast<float>();
    }
    MatrixF wanted(rows, mixed.cols());
    wanted.noalias() = output * o_;
    for (const LatentGroup& group : attention_.groups) {
      const Heads heads{group.first_head, group.head_count};
      for_blocks(sample_, s, [&](const Block& block) {
        const auto weights = source_weights(sample_, block, heads, scratch);
        latent.resize(heads.count * block.rows, group.rank);
        for (Index i = 0; i < heads.count; ++i) {
          const Index h = heads.first + i;
          latent.middleRows(i * block.rows, block.rows).noalias() =
              wanted.block(block.first, h * w, block.rows, w) * value_up_[static_cast<std::size_t>(h)];
        }
        pull.block(0, p + group.first, block.columns, group.rank).noalias() += weights.transpose() * latent;
      });
    }
    rotate_in_place(reversed(turns_.all), 0, p, 1, pull);
    if (shrink.size() > 0) {
      pull.rightCols(width - p).array().colwise() *= shrink.array();
    }
    MatrixF out(width, x.cols());
    out.noalias() = pull.transpose() * x;
    return out;
  }

  const AttentionSample& sample_;
  const AbsorbedAttention& attention_;
  const Turns& turns_;
  std::vector<MatrixF> query_;  // per group, its heads stacked
  MatrixF o_;
  VectorF weight_;
  std::vector<MatrixF> value_up_;
};

}  // namespace

void keep_weights(AttentionSample& sample, std::size_t bytes) {
  std::size_t needed = 0;
  for_blocks(sample, 0, [&](const Block& block) {
    needed += static_cast<std::size_t>(source_heads(sample) * block.rows * block.columns) * sizeof(float);
  });
  if (needed * static_cast<std::size_t>(sample.count) <= bytes) {
    sample.weights.resize(static_cast<std::size_t>(sample.count));
  }
}

void measure_value_spread(const MatrixF& source_value, const MatrixF& o, AttentionSample& sample) {
  const Stage stage("value spread");
  const Index heads = source_heads(sample);
  const Index d = o.cols() / heads;
  std::vector<MatrixF> roots;
  for (Index h = 0; h < heads; ++h) {
    const MatrixD head = o.middleCols(h * d, d).cast<double>();
    roots.emplace_back(symmetric_root(head.transpose() * head, 0).root.cast<float>());
  }
  VectorD sum = VectorD::Zero(heads);
  in_batches<VectorD>(
      every(sample.count, moment_sequences),
      [&](Index i, VectorD& slot) {
        const Index s = i * moment_sequences;
        slot = VectorD::Zero(heads);
        MatrixF scratch;
        MatrixF mean;
        for (Index h = 0; h < heads; ++h) {
          MatrixF values(sample.length, d);
          values.noalias() =
              source_value.block(s * sample.length, h / sample.group_size * d, sample.length, d) *
              roots[static_cast<std::size_t>(h)];
          const VectorF squares = values.rowwise().squaredNorm();
          for_blocks(sample, s, [&](const Block& block) {
            const auto weights = source_weights(sample, block, {h, 1}, scratch);
            mean.resize(block.rows, d);
            mean.noalias() = weights * values.topRows(block.columns);
            slot(h) += static_cast<double>((weights * squares.head(block.columns)).sum()) -
                       static_cast<double>(mean.squaredNorm());
          });
        }
      },
      [&](Index, const std::vector<VectorD>& slots) {
        for (const VectorD& slot : slots) {
          sum += slot;
        }
      });
  sample.value_spread =
      (sum / static_cast<double>(every(sample.count, moment_sequences) * sample.per_sequence())).cwiseMax(0);
}

ScoreError fit_queries(const AttentionSample& sample, const FitOptions& options,
                       AbsorbedAttention& attention) {
  const Stage stage("fit queries");
  const Turns turns(attention.rotary, sample);
  const double ridge = options.query_ridge * scarcity(sample) * mean_square(sample.query_moment);
  const Side inputs = regularised(sample.query_moment, ridge);
  const Index heads = attention.heads();
  ScoreError out;
  for (const LatentGroup& group : attention.groups) {
    const std::vector<MatrixF> keys = all_keys(sample, attention, group, turns.all);
    const Index run =
        std::clamp<Index>(run_doubles / attention.query[static_cast<std::size_t>(group.first_head)].size(), 1,
                          group.head_count);
    const Index end = group.first_head + group.head_count;
    for (Index first = group.first_head; first < end; first += run) {
      const Index count = std::min(run, end - first);
      const Systems queries(attention.query.begin() + first, attention.query.begin() + first + count);
      const QueryProblem problem(sample, attention, group, turns, keys, {first, count});
      QueryProblem::Start start = problem.start(queries);
      std::vector<Side> sides(queries.size());
      parallel_for(sides.size(), [&](std::size_t h) { sides[h] = score_side(start.key_moment[h]); });
      const Solution solution = conjugate_gradients(
          std::move(start.residual), options.steps,
          [&](const Systems& direction) {
            Systems image = problem.apply(direction);
            for (std::size_t h = 0; h < image.size(); ++h) {
              image[h].noalias() += ridge * (sides[h].moment * direction[h]);
            }
            return image;
          },
          [&](const MatrixD& residual, std::size_t h) {
            return MatrixD(sides[h].inverse * residual * inputs.inverse);
          });
      for (std::size_t h = 0; h < queries.size(); ++h) {
        attention.query[static_cast<std::size_t>(first) + h] += solution.x[h];
        out.before += start.error[h] / static_cast<double>(heads);
        out.after += (start.error[h] - solution.gain[h]) / static_cast<double>(heads);
      }
    }
  }
  return out;
}

void fit_keys(const AttentionSample& sample, const FitOptions& options, AbsorbedAttention& attention) {
  const Stage stage("fit keys");
  const Turns turns(attention.rotary, sample);
  const double ridge = options.key_ridge * scarcity(sample) * mean_square(sample.input_moment);
  const Side inputs = regularised(sample.input_moment, ridge);
  const KeyProblem problem(sample, attention, turns, options.score_weight);
  const Side scores = score_side(problem.score_moment());
  const Solution solution = conjugate_gradients(
      {problem.residual(attention.key)}, options.steps,
      [&](const Systems& direction) {
        MatrixD image = problem.apply(direction.front());
        image.noalias() += ridge * (scores.moment * direction.front());
        return Systems{image};
      },
      [&](const MatrixD& residual, std::size_t) {
        return MatrixD(scores.inverse * residual * inputs.inverse);
      });
  attention.key += solution.x.front();
}

ScoreError fit_attention(const AttentionSample& sample, const FitOptions& options,
                         AbsorbedAttention& attention) {
  ScoreError out;
  for (Index round = 0; round < options.rounds; ++round) {
    const bool last = round + 1 == options.rounds;
    if (options.queries) {
      FitOptions here = options;
      here.steps = last ? options.steps : std::min(options.steps, passing_steps);
      const ScoreError error = fit_queries(sample, here, attention);
      out.before = round == 0 ? error.before : out.before;
      out.after = error.after;
      limit_content_rank(attention, sample.input_moment, sample.query_moment);
    }
    if (last) {
      break;
    }
    if (options.keys) {
      fit_keys(sample, options, attention);
      if (attention.norm.present()) {
        attention.norm = complete_norm(attention.latent(), sample.sampled_inputs, sample.input_moment,
                                       attention.norm.extra.rows());
      }
    }
  }
  return out;
}

}  // namespace relatent
