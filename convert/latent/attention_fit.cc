#include "convert/latent/attention_fit.h"

#include <Eigen/Dense>
#include <algorithm>
#include <optional>
#include <vector>

#include "convert/latent/fit_blocks.h"
#include "linalg/decompose.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Conjugate-gradient steps of the queries while keys are still to change.
constexpr Index passing_steps = 1;

}  // namespace

void keep_weights(AttentionSample& sample, std::size_t bytes) {
  const Heads heads{0, source_heads(sample)};
  std::size_t needed = 0;
  for (const Block& block : blocks_of(sample, 0)) {
    needed += static_cast<std::size_t>(heads.count * block.rows * block.columns) * sizeof(float);
  }
  if (needed * static_cast<std::size_t>(sample.count) > bytes) {
    return;
  }
  sample.weights = parallel_made(static_cast<std::size_t>(sample.count), [&](std::size_t s) {
    std::vector<MatrixF> kept;
    for (const Block& block : blocks_of(sample, static_cast<Index>(s))) {
      form_weights(sample, block, heads, kept.emplace_back());
    }
    return kept;
  });
}

void measure_value_spread(const MatrixF& source_value, const MatrixF& o, AttentionSample& sample) {
  const Stage stage("value spread");
  const Index heads = source_heads(sample);
  const Index d = o.cols() / heads;
  const std::vector<MatrixF> roots = parallel_made(static_cast<std::size_t>(heads), [&](std::size_t h) {
    const MatrixD head = o.middleCols(static_cast<Index>(h) * d, d).cast<double>();
    return MatrixF(symmetric_root(head.transpose() * head, 0).root.cast<float>());
  });
  VectorD sum = VectorD::Zero(heads);
  in_batches<double>(
      every(sample.count, moment_sequences), heads, sequences_at_once(sample.length),
      [&](Index i, Index h, double& slot) {
        const Index s = i * moment_sequences;
        MatrixF values(sample.length, d);
        values.noalias() =
            source_value.block(s * sample.length, h / sample.group_size * d, sample.length, d) *
            roots[static_cast<std::size_t>(h)];
        const VectorF squares = values.rowwise().squaredNorm();
        MatrixF scratch;
        MatrixF mean;
        for (const Block& block : blocks_of(sample, s)) {
          const auto weights = source_weights(sample, block, {h, 1}, scratch);
          mean.resize(block.rows, d);
          mean.noalias() = weights * values.topRows(block.columns);
          slot += static_cast<double>((weights * squares.head(block.columns)).sum()) -
                  static_cast<double>(mean.squaredNorm());
        }
      },
      [&](Index, const std::vector<double>& slots) {
        for (std::size_t i = 0; i < slots.size(); ++i) {
          sum(static_cast<Index>(i) % heads) += slots[i];
        }
      });
  sample.value_spread =
      (sum / static_cast<double>(every(sample.count, moment_sequences) * sample.per_sequence())).cwiseMax(0);
}

ScoreError fit_attention(const AttentionSample& sample, const FitOptions& options,
                         AbsorbedAttention& attention) {
  ScoreError out;
  std::optional<QueryFit> fit;
  if (options.queries && options.rounds > 0) {
    fit.emplace(sample, options);
  }
  for (Index round = 0; round < options.rounds; ++round) {
    const bool last = round + 1 == options.rounds;
    if (fit) {
      const Index steps = last ? options.steps : std::min(options.steps, passing_steps);
      const ScoreError error = (*fit)(steps, attention);
      out.before = round == 0 ? error.before : out.before;
      out.after = error.after;
    }
    if (last) {
      break;
    }
    if (fit) {
      limit_content_rank(attention, sample.input_moment, sample.asked_moment());
    }
    if (options.keys) {
      fit_keys(sample, options, attention);
      if (attention.norm.present()) {
        fit_norm(attention.latent(), sample.sampled_inputs, sample.input_moment, attention.norm);
      }
    }
  }
  return out;
}

}  // namespace relatent
