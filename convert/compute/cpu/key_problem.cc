#include "convert/compute/cpu/key_problem.h"

#include <Eigen/Dense>
#include <algorithm>
#include <vector>

#include "convert/compute/cpu/fit_blocks.h"
#include "convert/compute/cpu/latent_norm.h"
#include "linalg/layouts.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// The keys are fitted on every second sequence where that leaves so many queries for each unknown: all heads
// share them, so they see more queries.
constexpr Index key_sequences = 2;
constexpr Index key_queries_per_unknown = 4;
// Queries whose outputs one piece of work compares.
constexpr Index output_rows = 256;

Index key_step(const AttentionSample& sample) {
  const Index queries = every(sample.count, key_sequences) * sample.per_sequence();
  return queries >= key_queries_per_unknown * sample.sampled_inputs.cols() ? key_sequences : 1;
}

// Errors of the scores and of the output as a function of the key map.
class KeyProblem final : public FitProblem {
 public:
  KeyProblem(const AttentionSample& sample, const AbsorbedAttention& attention, double ridge,
             double score_weight)
      : sample_(sample),
        attention_(attention),
        ridge_(ridge),
        inputs_(input_side(sample.input_moment, ridge, sample.compute)),
        rotations_(attention.rotary, sample),
        o_(narrowed(attention.o), sample.compute),
        o_transposed_(MatrixF(attention.o.transpose().cast<float>()), sample.compute),
        weight_((score_weight * sample.value_spread).cast<float>()) {
    for (const MatrixD& up : attention.value_up) {
      value_up_.emplace_back(up.cast<float>());
    }
    for (const LatentGroup& group : attention.groups) {
      for (const Heads heads : head_chunks({group.first_head, group.head_count})) {
        chunks_.push_back({&group, query_maps(sample, attention.query, 0, heads)});
      }
    }
  }

  Start start(const Systems& key) override {
    const VectorD one = VectorD::Ones(weight_.size());
    sides_.push_back(score_side(key_curvature(sample_, attention_, weight_.cast<double>(), one)));
    return {{run(key.front(), true)}, {}};
  }

  Systems apply(const Systems& direction) const override {
    Systems image{run(direction.front(), false)};
    add_ridge(sides_, {&ridge_, 1}, direction, image);
    return image;
  }

  Systems precondition(const Systems& residual) const override {
    return relatent::precondition(sides_, residual,
                                  [&](std::size_t) -> const ProductMap& { return inputs_; });
  }

 private:
  struct Chunk {
    const LatentGroup* group;
    QueryMaps queries;
  };

  // A sequence while the errors are formed.
  struct Sequence {
    Index index = 0;
    MatrixF z;
    VectorF shrink;
    MatrixF mixed;  // [per_sequence, H w]: what o_proj reads, then what that should have been more
    std::vector<MatrixF> gradient;  // per chunk: [length, p + its group's rank]
    MatrixF sum;                    // [p + r, D + 1]
  };

  MatrixD run(const MatrixD& key, bool against_source) const {
    MatrixD out = MatrixD::Zero(key.rows(), key.cols());
    const MatrixF map = key.cast<float>();
    const Index step = key_step(sample_);
    const Index count = every(sample_.count, step);
    const Index batch = sequences_at_once(sample_.length);
    for (Index first = 0; first < count; first += batch) {
      std::vector<Sequence> sequences(static_cast<std::size_t>(std::min(batch, count - first)));
      for (std::size_t i = 0; i < sequences.size(); ++i) {
        sequences[i].index = (first + static_cast<Index>(i)) * step;
      }
      run(map, against_source, sequences);
      for (const Sequence& sequence : sequences) {
        out += sequence.sum.cast<double>();
      }
    }
    return out / static_cast<double>(count * sample_.per_sequence());
  }

  void run(const MatrixF& map, bool against_source, std::vector<Sequence>& sequences) const {
    const Index p = attention_.rope_dim();
    const Index rows = sample_.per_sequence();
    parallel_for(sequences.size(), [&](std::size_t i) {
      Sequence& here = sequences[i];
      const MatrixF x = sample_.inputs(here.index);
      here.shrink = latent_shrink(attention_, x);
      here.z = keys_of(x, map, here.shrink, rotations_.all, p);
      here.mixed.resize(rows, attention_.heads() * attention_.v_dim());
      here.gradient.resize(chunks_.size());
    });
    const auto for_chunks = [&](const auto& body) {
      parallel_for(sequences.size() * chunks_.size(), [&](std::size_t i) {
        const std::size_t c = i % chunks_.size();
        Sequence& here = sequences[i / chunks_.size()];
        body(here, chunks_[c], here.gradient[c]);
      });
    };
    for_chunks([&](Sequence& here, const Chunk& chunk, MatrixF& gradient) {
      compare_scores(chunk, against_source, here, gradient);
    });
    const Index slices = every(rows, output_rows);
    parallel_for(sequences.size() * static_cast<std::size_t>(slices), [&](std::size_t i) {
      const Index first = static_cast<Index>(i) % slices * output_rows;
      compare_outputs(first, std::min(output_rows, rows - first), against_source,
                      sequences[i / static_cast<std::size_t>(slices)]);
    });
    for_chunks([&](const Sequence& here, const Chunk& chunk, MatrixF& gradient) {
      add_value_gradient(here, chunk, gradient);
    });
    parallel_for(sequences.size(), [&](std::size_t i) { collect(sequences[i]); });
  }

  // The gradient of a chunk's score errors by the keys; its heads' part of `mixed`.
  void compare_scores(const Chunk& chunk, bool against_source, Sequence& here, MatrixF& gradient) const {
    const LatentGroup& group = *chunk.group;
    const Heads heads = chunk.queries.heads;
    const Index p = attention_.rope_dim();
    const Index w = attention_.v_dim();
    const auto share = 1.0F / static_cast<float>(group.parts.size());
    const MatrixF whole = queries_of(sample_, here.index, chunk.queries, rotations_);
    gradient = MatrixF::Zero(here.z.rows(), p + group.rank);
    MatrixF logits;
    MatrixF scores;
    MatrixF queries;
    MatrixF latent;  // stacked
    MatrixF scratch;
    const std::vector<Block> blocks = blocks_of(sample_, here.index);
    for (const LatentPart& part : group.parts) {
      const MatrixF keys = gather_keys(here.z, group, part, p, group.first);
      const MatrixF asked = gather_queries(whole, heads.count, group, part, p);
      MatrixF by_keys = MatrixF::Zero(keys.rows(), keys.cols());
      for (const Block& block : blocks) {
        const auto weights = source_weights(sample_, block, heads, scratch);
        const auto seen = keys.topRows(block.columns);
        stack_heads(asked, block, heads.count, queries);
        scores.resize(queries.rows(), block.columns);
        scores.noalias() = queries * seen.transpose();
        if (against_source) {
          source_logits(sample_, block, heads, logits);
          scores = logits - scores;
        }
        for (Index i = 0; i < heads.count; ++i) {
          auto of_head = scores.middleRows(i * block.rows, block.rows);
          centre(weights.middleRows(i * block.rows, block.rows), of_head);
          of_head *= share * weight_(heads.first + i);
        }
        by_keys.topRows(block.columns).noalias() += scores.transpose() * queries;
      }
      scatter_keys(by_keys, group, part, p, gradient);
    }
    for (const Block& block : blocks) {
      const auto weights = source_weights(sample_, block, heads, scratch);
      latent.resize(heads.count * block.rows, group.rank);
      latent.noalias() = weights * here.z.block(0, p + group.first, block.columns, group.rank);
      for (Index i = 0; i < heads.count; ++i) {
        const Index h = heads.first + i;
        here.mixed.block(block.first, h * w, block.rows, w).noalias() =
            latent.middleRows(i * block.rows, block.rows) *
            value_up_[static_cast<std::size_t>(h)].transpose();
      }
    }
  }

  // What the layer puts out, or how far that is from what it should, back to the heads' values.
  void compare_outputs(Index first, Index count, bool against_source, Sequence& here) const {
    MatrixF output = o_(here.mixed.middleRows(first, count));
    if (against_source) {
      output = sample_.target.middleRows(here.index * sample_.per_sequence() + first, count) - output;
      output.rowwise() -= attention_.o_bias.transpose().cast<float>();
    }
    here.mixed.middleRows(first, count) = o_transposed_(output);
  }

  void add_value_gradient(const Sequence& here, const Chunk& chunk, MatrixF& gradient) const {
    const LatentGroup& group = *chunk.group;
    const Heads heads = chunk.queries.heads;
    const Index w = attention_.v_dim();
    MatrixF latent;
    MatrixF scratch;
    for (const Block& block : blocks_of(sample_, here.index)) {
      const auto weights = source_weights(sample_, block, heads, scratch);
      latent.resize(heads.count * block.rows, group.rank);
      for (Index i = 0; i < heads.count; ++i) {
        const Index h = heads.first + i;
        latent.middleRows(i * block.rows, block.rows).noalias() =
            here.mixed.block(block.first, h * w, block.rows, w) * value_up_[static_cast<std::size_t>(h)];
      }
      gradient.block(0, attention_.rope_dim(), block.columns, group.rank).noalias() +=
          weights.transpose() * latent;
    }
  }

  // All chunks' gradients as one, by the key map.
  void collect(Sequence& here) const {
    std::vector<KeyGradient> gradients;
    for (std::size_t c = 0; c < chunks_.size(); ++c) {
      gradients.push_back({chunks_[c].group, &here.gradient[c]});
    }
    here.sum =
        key_map_gradient(attention_, gradients, rotations_.all, here.shrink, sample_.inputs(here.index));
  }

  const AttentionSample& sample_;
  const AbsorbedAttention& attention_;
  double ridge_;
  ProductMap inputs_;  // (input_moment + ridge)⁻¹
  SampleRotations rotations_;
  ProductMap o_;
  ProductMap o_transposed_;
  VectorF weight_;
  std::vector<MatrixF> value_up_;
  std::vector<Chunk> chunks_;     // of all groups
  std::vector<ScoreSide> sides_;  // one
};

}  // namespace

std::unique_ptr<FitProblem> make_key_problem(const AttentionSample& sample,
                                             const AbsorbedAttention& attention, double ridge,
                                             double score_weight) {
  return std::make_unique<KeyProblem>(sample, attention, ridge, score_weight);
}

}  // namespace relatent
