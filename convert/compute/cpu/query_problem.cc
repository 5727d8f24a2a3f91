#include "convert/compute/cpu/query_problem.h"

#include <Eigen/Dense>
#include <algorithm>
#include <utility>
#include <vector>

#include "convert/compute/cpu/fit_blocks.h"
#include "convert/compute/cpu/latent_norm.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Doubles that each vector of one conjugate-gradient run may take; heads are fitted in runs of that size.
constexpr Index run_doubles = 20'000'000;

// How many heads with a query of so many numbers a run takes, whole chunks where it can.
Index heads_at_once(Index query_size) {
  const Index heads = run_doubles / query_size;
  return heads < chunk_heads ? std::max<Index>(1, heads) : heads / chunk_heads * chunk_heads;
}

// The key map as a group reads it: rotary rows, then its latent's.
MatrixF key_map(const AbsorbedAttention& attention, const LatentGroup& group) {
  MatrixF out(attention.rope_dim() + group.rank, attention.key.cols());
  out << attention.key.topRows(attention.rope_dim()).cast<float>(), attention.latent_of(group).cast<float>();
  return out;
}

std::vector<MatrixF> all_keys(const AttentionSample& sample, const AbsorbedAttention& attention,
                              const LatentGroup& group, const RotaryTable& table) {
  const MatrixF key = key_map(attention, group);
  return parallel_made(static_cast<std::size_t>(sample.count), [&](std::size_t s) {
    const MatrixF x = sample.inputs(static_cast<Index>(s));
    return keys_of(x, key, latent_shrink(attention, x), table, attention.rope_dim());
  });
}

// What all runs of heads share.
struct Shared {
  const AttentionSample& sample;
  const SampleRotations& rotations;
  double ridge;
  // (asked_moment + ridge)⁻¹, for all heads or for each
  const std::vector<ProductMap>& inputs;
  // What the queries of each batch of sequences act on, for bfloat16, or nothing.
  const std::vector<PackedWeight>& packed_inputs;
};

// The score errors of a run of heads as a function of their queries.
class QueryProblem final : public FitProblem {
 public:
  // keys: z of the group per sequence.
  QueryProblem(const Shared& shared, const AbsorbedAttention& attention, const LatentGroup& group,
               const std::vector<MatrixF>& keys, Heads heads)
      : shared_(shared),
        sample_(shared.sample),
        group_(group),
        keys_(keys),
        chunks_(head_chunks(heads)),
        p_(attention.rope_dim()),
        width_(attention.query[static_cast<std::size_t>(heads.first)].rows()),
        first_head_(heads.first) {}

  // error: J_h, the mean over parts.
  Start start(const Systems& queries) override {
    Start out;
    // Per head: within-query covariance of what its rows read, by parts.
    std::vector<MatrixD> key_moment(queries.size(), MatrixD::Zero(width_, width_));
    out.error.assign(queries.size(), 0);
    out.residual = run(queries, true, [&](Heads heads, const Slot& slot) {
      for (std::size_t i = 0; i < slot.error.size(); ++i) {
        const auto h = static_cast<std::size_t>(heads.first - first_head_) + i;
        out.error[h] += slot.error[i];
        if (!slot.key_moment.empty()) {
          key_moment[h] += slot.key_moment[i].cast<double>();
        }
      }
    });
    const auto moment_rows =
        static_cast<double>(every(sample_.count, moment_sequences) * sample_.per_sequence());
    for (std::size_t h = 0; h < queries.size(); ++h) {
      key_moment[h] /= moment_rows;
      out.error[h] /= rows();
      average_pairs(key_moment[h], p_);
    }
    sides_ =
        parallel_made(queries.size(), [&](std::size_t h) { return score_side(std::move(key_moment[h])); });
    return out;
  }

  Systems apply(const Systems& direction) const override {
    Systems image = run(direction, false, [](Heads, const Slot&) {});
    add_ridge(sides_, {&shared_.ridge, 1}, direction, image);
    return image;
  }

  Systems precondition(const Systems& residual) const override {
    const auto first = static_cast<std::size_t>(first_head_);
    return relatent::precondition(sides_, residual, [&](std::size_t i) -> const ProductMap& {
      return shared_.inputs[sample_.by_head() ? first + i : 0];
    });
  }

 private:
  // What a piece of work finds besides the gradient, per head.
  struct Slot {
    std::vector<MatrixF> key_moment;
    std::vector<double> error;
  };

  double rows() const { return static_cast<double>(sample_.sampled_inputs.rows()); }

  template <typename Also>
  Systems run(const Systems& queries, bool against_source, const Also& also) const {
    Systems sum;
    for (const MatrixD& m : queries) {
      sum.emplace_back(MatrixD::Zero(m.rows(), m.cols()));
    }
    const std::vector<QueryMaps> maps = parallel_made(
        chunks_.size(), [&](std::size_t c) { return query_maps(sample_, queries, first_head_, chunks_[c]); });
    const auto heads = static_cast<Index>(queries.size());
    const Index each = sample_.per_sequence();
    const Index batch = sequences_at_once(sample_.length);
    for (Index first = 0; first < sample_.count; first += batch) {
      const Index count = std::min(batch, sample_.count - first);
      // Σ_n P_mn error_mn z_n, in the frame of the unrotated query, for all heads and queries.
      MatrixF gradient(count * each, heads * width_);
      std::vector<Slot> slots(static_cast<std::size_t>(count) * chunks_.size());
      parallel_for(slots.size(), [&](std::size_t i) {
        const std::size_t c = i % chunks_.size();
        const auto s = static_cast<Index>(i / chunks_.size());
        gradient.block(s * each, (chunks_[c].first - first_head_) * width_, each, chunks_[c].count * width_) =
            run(first + s, chunks_[c], maps[c], against_source, slots[i]);
      });
      add(first, gradient, sum);
      for (std::size_t i = 0; i < slots.size(); ++i) {
        also(chunks_[i % chunks_.size()], slots[i]);
      }
    }
    for (MatrixD& m : sum) {
      m /= rows();
    }
    return sum;
  }

  // The gradient by the queries of a chunk: [per_sequence, heads * width].
  MatrixF run(Index s, Heads chunk, const QueryMaps& maps, bool against_source, Slot& slot) const {
    const MatrixF u = queries_of(sample_, s, maps, shared_.rotations);
    const MatrixF& z = keys_[static_cast<std::size_t>(s)];
    const Index heads = chunk.count;
    const auto share = 1.0F / static_cast<float>(group_.parts.size());
    MatrixF out = MatrixF::Zero(u.rows(), u.cols());
    slot.error.assign(static_cast<std::size_t>(heads), 0);
    const bool wants_moment = against_source && s % moment_sequences == 0;
    slot.key_moment.assign(static_cast<std::size_t>(wants_moment ? heads : 0), MatrixF::Zero(width_, width_));
    for (const LatentPart& part : group_.parts) {
      const Index width = p_ + group_.width(part);
      const MatrixF queries = gather_queries(u, heads, group_, part, p_);
      // What all keys of a sequence have in common shifts a query's scores by a constant, and would drown
      // what is left in rounding: published models have offsets a hundred times their variance.
      MatrixF keys = gather_keys(z, group_, part, p_, 0);
      keys.rowwise() -= keys.colwise().mean().eval();
      MatrixF gradient(queries.rows(), queries.cols());
      MatrixF received = MatrixF::Zero(wants_moment ? heads : 0, sample_.length);
      MatrixF mean_keys(wants_moment ? queries.rows() : 0, queries.cols());
      MatrixF logits;
      MatrixF scratch;
      MatrixF scores;
      MatrixF stack;
      for (const Block& block : blocks_of(sample_, s)) {
        const auto weights = source_weights(sample_, block, chunk, scratch);
        const auto seen = keys.topRows(block.columns);
        stack_heads(queries, block, heads, stack);
        scores.resize(stack.rows(), block.columns);
        scores.noalias() = stack * seen.transpose();
        if (against_source) {
          source_logits(sample_, block, chunk, logits);
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
        unstack_heads(stack, block, heads, gradient);
      }
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
      gradient *= share;
      scatter_queries(gradient, heads, group_, part, p_, out);
    }
    rotate_in_place(reversed(shared_.rotations.of(s)), 0, width_, heads, out);
    return out;
  }

  // Adds gradientᵀ x̃ of every head, over a batch of sequences.
  void add(Index first_sequence, const MatrixF& gradient, Systems& sum) const {
    const auto batch = static_cast<std::size_t>(first_sequence / sequences_at_once(sample_.length));
    for_slices(sum, [&](std::size_t h, Index first, Index rows) {
      const auto of_slice = gradient.middleCols(static_cast<Index>(h) * width_ + first, rows);
      const auto inputs = sample_.asked(first_head_ + static_cast<Index>(h),
                                        first_sequence * sample_.per_sequence(), gradient.rows());
      const MatrixF product = shared_.packed_inputs.empty()
                                  ? MatrixF(of_slice.transpose() * inputs)
                                  : shared_.packed_inputs[batch].times_transposed(of_slice);
      sum[h].middleRows(first, rows) += product.cast<double>();
    });
  }

  const Shared& shared_;
  const AttentionSample& sample_;
  const LatentGroup& group_;
  const std::vector<MatrixF>& keys_;
  std::vector<Heads> chunks_;
  Index p_;
  Index width_;
  Index first_head_;
  std::vector<ScoreSide> sides_;  // per head
};

class CpuQueryProblems final : public QueryProblems {
 public:
  CpuQueryProblems(const AttentionSample& sample, double ridge) : sample_(sample), ridge_(ridge) {
    inputs_ = parallel_made(sample.by_head() ? sample.head_moments.size() : 1, [&](std::size_t h) {
      return input_side(sample.asked_moment(static_cast<Index>(h)), ridge, sample.compute);
    });
    if (sample.compute == DType::bf16 && !sample.by_head()) {
      const Index batch = sequences_at_once(sample.length);
      const Index rows = sample.per_sequence();
      packed_inputs_ =
          parallel_made(static_cast<std::size_t>(every(sample.count, batch)), [&](std::size_t i) {
            const Index first = static_cast<Index>(i) * batch;
            return PackedWeight::of_transposed(
                sample.asked().middleRows(first * rows, std::min(batch, sample.count - first) * rows));
          });
    }
  }

  void for_heads(const AbsorbedAttention& attention,
                 const std::function<void(Heads, FitProblem&)>& body) const override {
    const SampleRotations rotations(attention.rotary, sample_);
    const Shared shared{sample_, rotations, ridge_, inputs_, packed_inputs_};
    for (const LatentGroup& group : attention.groups) {
      const std::vector<MatrixF> keys = all_keys(sample_, attention, group, rotations.all);
      const Index run = heads_at_once(attention.query[static_cast<std::size_t>(group.first_head)].size());
      const Index end = group.first_head + group.head_count;
      for (Index first = group.first_head; first < end; first += run) {
        const Heads heads{first, std::min(run, end - first)};
        QueryProblem problem(shared, attention, group, keys, heads);
        body(heads, problem);
      }
    }
  }

 private:
  const AttentionSample& sample_;
  double ridge_;
  std::vector<ProductMap> inputs_;
  std::vector<PackedWeight> packed_inputs_;
};

}  // namespace

std::unique_ptr<QueryProblems> make_query_problems(const AttentionSample& sample, double ridge) {
  return std::make_unique<CpuQueryProblems>(sample, ridge);
}

std::uint64_t query_fit_bytes(Index heads, Index width, Index inputs, const SampleSize& size) {
  const Index run = std::min(heads, heads_at_once(width * inputs));
  const Index queries = size.count * size.per_sequence();
  const Index at_once = std::min(size.count, sequences_at_once(size.length)) * size.per_sequence();
  const Index for_thread = 3 * size.per_sequence() * std::min(run, chunk_heads) * width;
  const bool packs = size.compute == DType::bf16;
  // The inverse; queries, residual, direction, image and solution of a run, and their maps; their
  // gradients.
  Index bytes = (packs ? 2 : 4) * inputs * inputs + (5 * 8 + (packs ? 2 : 4)) * run * width * inputs;
  bytes += 4 * (at_once * run * width + num_threads() * for_thread) + (packs ? 2 * queries * inputs : 0);
  return static_cast<std::uint64_t>(bytes);
}

}  // namespace relatent
