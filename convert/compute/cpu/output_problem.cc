#include "convert/compute/cpu/output_problem.h"

#include <Eigen/Dense>
#include <algorithm>
#include <utility>
#include <vector>

#include "convert/compute/cpu/fit_blocks.h"
#include "convert/compute/cpu/latent_norm.h"
#include "convert/compute/cpu/output_curvature.h"
#include "convert/compute/cpu/output_layer.h"
#include "linalg/layouts.h"
#include "linalg/moments.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Queries whose outputs one piece of work compares.
constexpr Index output_rows = 256;

class CpuOutputProblem final : public OutputProblem {
 public:
  CpuOutputProblem(const AttentionSample& sample, const AbsorbedAttention& attention, double query_ridge,
                   double key_ridge)
      : layer_(sample, attention),
        sample_(sample),
        attention_(attention),
        query_ridge_(query_ridge),
        key_ridge_(key_ridge),
        o_(narrowed(attention.o), sample.compute),
        o_transposed_(MatrixF(attention.o.transpose().cast<float>()), sample.compute) {
    for (const MatrixD& query : attention.query) {
      first_column_.push_back(columns_);
      columns_ += query.rows();
    }
  }

  Start start(const Systems&) override {
    sides_ = output_curvature(layer_);
    inputs_ = parallel_made(sample_.by_head() ? sample_.head_moments.size() : 1, [&](std::size_t h) {
      return input_side(sample_.asked_moment(static_cast<Index>(h)), query_ridge_, sample_.compute);
    });
    inputs_.push_back(input_side(sample_.input_moment, key_ridge_, sample_.compute));
    Start out;
    double error = 0;
    out.residual = run(nullptr, nullptr, error);
    out.error = {error};
    return out;
  }

  double error() const override {
    double out = 0;
    const Index batch = sequences_at_once(sample_.length);
    for (Index first = 0; first < sample_.count; first += batch) {
      std::vector<Sequence> sequences = batch_of(first, nullptr);
      forward(nullptr, sequences);
      compare(true, false, sequences);
      for (const Sequence& sequence : sequences) {
        out += sequence.error;
      }
    }
    return out / rows();
  }

  RefitSums sums(bool affine) const override {
    const Index features = attention_.heads() * attention_.v_dim();
    RefitSums out{MatrixD::Zero(features + 1, features + 1), MatrixD::Zero(attention_.o.rows(), features + 1),
                  sample_.sampled_inputs.rows()};
    const Index batch = sequences_at_once(sample_.length);
    const Index each = sample_.per_sequence();
    for (Index first = 0; first < sample_.count; first += batch) {
      std::vector<Sequence> sequences = batch_of(first, nullptr);
      forward(nullptr, sequences);
      const auto count = static_cast<Index>(sequences.size());
      MatrixF read(count * each, features + 1);
      read.col(features).setConstant(affine ? 1.0F : 0.0F);
      MatrixF errors(count * each, attention_.o.rows());
      parallel_for(sequences.size(), [&](std::size_t i) {
        const auto at = static_cast<Index>(i) * each;
        read.block(at, 0, each, features) = sequences[i].mixed;
        errors.middleRows(at, each) =
            sample_.target.middleRows(sequences[i].index * each, each) - o_(sequences[i].mixed);
        errors.middleRows(at, each).rowwise() -= attention_.o_bias.transpose().cast<float>();
        sequences[i].error = static_cast<double>(errors.middleRows(at, each).squaredNorm());
      });
      for (const Sequence& sequence : sequences) {
        out.error_square += sequence.error;
      }
      add_second_moment(read, out.feature_moment);
      add_cross_moment(errors, read, out.error_moment);
    }
    return out;
  }

  Systems apply(const Systems& direction) const override {
    std::vector<QueryMaps> queries;
    for (const HeadChunk& chunk : layer_.chunks) {
      queries.push_back(query_maps(sample_, direction, 0, chunk.heads));
    }
    const MatrixF key = direction.back().cast<float>();
    double ignored = 0;
    Systems image = run(&queries, &key, ignored);
    std::vector<double> ridges(attention_.query.size(), query_ridge_);
    ridges.push_back(key_ridge_);
    add_ridge(sides_, ridges, direction, image);
    return image;
  }

  Systems precondition(const Systems& residual) const override {
    return relatent::precondition(sides_, residual, [&](std::size_t i) -> const ProductMap& {
      const bool shared = !sample_.by_head() && i + 1 < residual.size();
      return shared ? inputs_.front() : inputs_[std::min(i, inputs_.size() - 1)];
    });
  }

 private:
  struct Sequence {
    Index index = 0;
    MatrixF x;
    VectorF shrink;
    MatrixF z;
    MatrixF z_change;  // by the direction
    MatrixF mixed;     // [per_sequence, H w]: what o_proj reads, then what that should have been more
    double error = 0;  // sum of squares
    std::vector<MatrixF> key_gradient;  // per chunk
    MatrixF sum;                        // [p + r, D + 1]
  };

  double rows() const { return static_cast<double>(sample_.sampled_inputs.rows()); }

  std::vector<Sequence> batch_of(Index first, const MatrixF* key_change) const {
    const Index batch = sequences_at_once(sample_.length);
    std::vector<Sequence> out(static_cast<std::size_t>(std::min(batch, sample_.count - first)));
    const Index p = attention_.rope_dim();
    parallel_for(out.size(), [&](std::size_t i) {
      Sequence& here = out[i];
      here.index = first + static_cast<Index>(i);
      here.x = sample_.inputs(here.index);
      here.shrink = latent_shrink(attention_, here.x);
      here.z = keys_of(here.x, layer_.key, here.shrink, layer_.rotations.all, p);
      if (key_change != nullptr) {
        here.z_change = keys_of(here.x, *key_change, here.shrink, layer_.rotations.all, p);
      }
      here.mixed = MatrixF::Zero(sample_.per_sequence(), attention_.heads() * attention_.v_dim());
      here.key_gradient.resize(layer_.chunks.size());
    });
    return out;
  }

  template <typename Body>
  void for_chunks(std::vector<Sequence>& sequences, const Body& body) const {
    parallel_for(sequences.size() * layer_.chunks.size(),
                 [&](std::size_t i) { body(sequences[i / layer_.chunks.size()], i % layer_.chunks.size()); });
  }

  void forward(const std::vector<QueryMaps>* change, std::vector<Sequence>& sequences) const {
    for_chunks(sequences, [&](Sequence& here, std::size_t c) {
      mix(layer_.chunks[c], change != nullptr ? &(*change)[c] : nullptr, here);
    });
  }

  // Errors of the output, or its change; where they are wanted, back to what o_proj reads.
  void compare(bool against_target, bool back, std::vector<Sequence>& sequences) const {
    const Index each = sample_.per_sequence();
    parallel_for(sequences.size(), [&](std::size_t i) {
      Sequence& here = sequences[i];
      for (Index first = 0; first < each; first += output_rows) {
        const Index count = std::min(output_rows, each - first);
        MatrixF output = o_(here.mixed.middleRows(first, count));
        if (against_target) {
          output = sample_.target.middleRows(here.index * each + first, count) - output;
          output.rowwise() -= attention_.o_bias.transpose().cast<float>();
          here.error += static_cast<double>(output.squaredNorm());
        }
        if (back) {
          here.mixed.middleRows(first, count) = o_transposed_(output);
        }
      }
    });
  }

  Systems run(const std::vector<QueryMaps>* change, const MatrixF* key_change, double& error) const {
    Systems sum;
    for (const MatrixD& query : attention_.query) {
      sum.emplace_back(MatrixD::Zero(query.rows(), query.cols()));
    }
    sum.emplace_back(MatrixD::Zero(attention_.key.rows(), attention_.key.cols()));
    const Index each = sample_.per_sequence();
    const Index batch = sequences_at_once(sample_.length);
    for (Index first = 0; first < sample_.count; first += batch) {
      std::vector<Sequence> sequences = batch_of(first, key_change);
      forward(change, sequences);
      compare(change == nullptr, true, sequences);
      MatrixF gradient(static_cast<Index>(sequences.size()) * each, columns_);
      for_chunks(sequences, [&](Sequence& here, std::size_t c) {
        const HeadChunk& chunk = layer_.chunks[c];
        const Index width = chunk.queries.width;
        gradient.block((here.index - first) * each,
                       first_column_[static_cast<std::size_t>(chunk.heads.first)], each,
                       chunk.heads.count * width) = back(chunk, here, here.key_gradient[c]);
      });
      parallel_for(sequences.size(), [&](std::size_t i) { collect(sequences[i]); });
      for (const Sequence& here : sequences) {
        sum.back() += here.sum.cast<double>();
        error += here.error / rows();
      }
      add(first, gradient, sum);
    }
    for (MatrixD& m : sum) {
      m /= rows();
    }
    return sum;
  }

  // A chunk's part of what o_proj reads, or of its change.
  void mix(const HeadChunk& chunk, const QueryMaps* change, Sequence& here) const {
    const LatentGroup& group = *chunk.group;
    const Heads heads = chunk.heads;
    const Index p = attention_.rope_dim();
    const Index w = attention_.v_dim();
    const MatrixF whole = queries_of(sample_, here.index, chunk.queries, layer_.rotations);
    const MatrixF whole_change =
        change != nullptr ? queries_of(sample_, here.index, *change, layer_.rotations) : MatrixF();
    MatrixF queries;
    MatrixF query_change;
    MatrixF weights;
    MatrixF slope;
    MatrixF scores;
    MatrixF latent;
    for (std::size_t b = 0; b < group.parts.size(); ++b) {
      const OutputPart read = layer_.part(chunk, b, here.z, whole);
      MatrixF key_change;
      MatrixF asked_change;
      if (change != nullptr) {
        key_change = layer_.keys_of_part(here.z_change, group, read.part);
        asked_change = gather_queries(whole_change, heads.count, group, read.part, p);
      }
      for (const Block& block : blocks_of(sample_, here.index)) {
        stack_heads(read.asked, block, heads.count, queries);
        layer_.weights_of(queries, read.keys.topRows(block.columns), block, weights, slope);
        latent.resize(queries.rows(), read.count);
        if (change == nullptr) {
          latent.noalias() = weights * read.content.topRows(block.columns);
        } else {
          stack_heads(asked_change, block, heads.count, query_change);
          scores.resize(queries.rows(), block.columns);
          scores.noalias() = query_change * read.keys.topRows(block.columns).transpose();
          scores.noalias() += queries * key_change.topRows(block.columns).transpose();
          if (slope.size() > 0) {
            scores.array() *= slope.array();
          }
          centre(weights, scores);
          latent.noalias() = scores * read.content.topRows(block.columns);
          latent.noalias() +=
              weights * here.z_change.block(0, p + group.first + read.first, block.columns, read.count);
        }
        for (Index i = 0; i < heads.count; ++i) {
          const Index h = heads.first + i;
          here.mixed.block(block.first, h * w, block.rows, w).noalias() +=
              latent.middleRows(i * block.rows, block.rows) *
              layer_.value_up[static_cast<std::size_t>(h)].middleCols(read.first, read.count).transpose();
        }
      }
    }
  }

  // What of `mixed` comes back to a chunk's keys, and to its queries: [per_sequence, heads * width].
  MatrixF back(const HeadChunk& chunk, const Sequence& here, MatrixF& key_gradient) const {
    const LatentGroup& group = *chunk.group;
    const Heads heads = chunk.heads;
    const Index p = attention_.rope_dim();
    const Index w = attention_.v_dim();
    const MatrixF whole = queries_of(sample_, here.index, chunk.queries, layer_.rotations);
    MatrixF out = MatrixF::Zero(whole.rows(), whole.cols());
    key_gradient = MatrixF::Zero(here.z.rows(), p + group.rank);
    MatrixF queries;
    MatrixF weights;
    MatrixF slope;
    MatrixF scores;
    MatrixF latent;
    MatrixF stack;
    for (std::size_t b = 0; b < group.parts.size(); ++b) {
      const OutputPart read = layer_.part(chunk, b, here.z, whole);
      MatrixF gradient(read.asked.rows(), read.asked.cols());
      MatrixF by_keys = MatrixF::Zero(read.keys.rows(), read.keys.cols());
      for (const Block& block : blocks_of(sample_, here.index)) {
        stack_heads(read.asked, block, heads.count, queries);
        layer_.weights_of(queries, read.keys.topRows(block.columns), block, weights, slope);
        latent.resize(queries.rows(), read.count);
        for (Index i = 0; i < heads.count; ++i) {
          const Index h = heads.first + i;
          latent.middleRows(i * block.rows, block.rows).noalias() =
              here.mixed.block(block.first, h * w, block.rows, w) *
              layer_.value_up[static_cast<std::size_t>(h)].middleCols(read.first, read.count);
        }
        key_gradient.block(0, p + read.first, block.columns, read.count).noalias() +=
            weights.transpose() * latent;
        scores.resize(queries.rows(), block.columns);
        scores.noalias() = latent * read.content.topRows(block.columns).transpose();
        centre(weights, scores);
        if (slope.size() > 0) {
          scores.array() *= slope.array();
        }
        stack.resize(queries.rows(), queries.cols());
        stack.noalias() = scores * read.keys.topRows(block.columns);
        unstack_heads(stack, block, heads.count, gradient);
        by_keys.topRows(block.columns).noalias() += scores.transpose() * queries;
      }
      scatter_keys(by_keys, group, read.part, p, key_gradient);
      scatter_queries(gradient, heads.count, group, read.part, p, out);
    }
    rotate_in_place(reversed(layer_.rotations.of(here.index)), 0, chunk.queries.width, heads.count, out);
    return out;
  }

  // All chunks' gradients as one, by the key map.
  void collect(Sequence& here) const {
    std::vector<KeyGradient> gradients;
    for (std::size_t c = 0; c < layer_.chunks.size(); ++c) {
      gradients.push_back({layer_.chunks[c].group, &here.key_gradient[c]});
    }
    here.sum = key_map_gradient(attention_, gradients, layer_.rotations.all, here.shrink, here.x);
  }

  // Adds gradientᵀ x̃ of every head's query, over a batch of sequences.
  void add(Index first_sequence, const MatrixF& gradient, Systems& sum) const {
    for_slices(attention_.query, [&](std::size_t h, Index first, Index rows) {
      const auto of_slice = gradient.middleCols(first_column_[h] + first, rows);
      const auto inputs =
          sample_.asked(static_cast<Index>(h), first_sequence * sample_.per_sequence(), gradient.rows());
      const MatrixF product = of_slice.transpose() * inputs;
      sum[h].middleRows(first, rows) += product.cast<double>();
    });
  }

  OutputLayer layer_;
  const AttentionSample& sample_;
  const AbsorbedAttention& attention_;
  double query_ridge_;
  double key_ridge_;
  ProductMap o_;
  ProductMap o_transposed_;
  std::vector<Index> first_column_;  // of each head's query among all
  Index columns_ = 0;
  // (moment + ridge)⁻¹ of what queries read, for all heads or for each, then of what keys read.
  std::vector<ProductMap> inputs_;
  std::vector<ScoreSide> sides_;  // per head, then of the key
};

}  // namespace

std::unique_ptr<OutputProblem> make_output_problem(const AttentionSample& sample,
                                                   const AbsorbedAttention& attention, double query_ridge,
                                                   double key_ridge) {
  return std::make_unique<CpuOutputProblem>(sample, attention, query_ridge, key_ridge);
}

std::uint64_t output_fit_bytes(Index heads, Index width, const FitInputs& inputs, const SampleSize& size) {
  const Index unknowns = width * (heads * inputs.query + inputs.key);
  const Index sequences = std::min(size.count, sequences_at_once(size.length));
  const Index rows = sequences * size.per_sequence();
  // Residual, direction, image, way and the layer that is tried, in float64, and maps of queries as they
  // stand and as they change.
  Index bytes = (6 * 8 + 2 * 4) * unknowns;
  // Inputs, keys, their change and gradients of a batch; the gradients of its queries.
  bytes += 4 * (sequences * size.length * (inputs.key + 4 * width) + 2 * rows * heads * width);
  return static_cast<std::uint64_t>(bytes);
}

}  // namespace relatent
