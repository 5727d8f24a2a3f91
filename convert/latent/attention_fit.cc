#include "convert/latent/attention_fit.h"

#include <algorithm>
#include <optional>

#include "convert/latent/norm_completion.h"

namespace relatent {
namespace {

// Conjugate-gradient steps of the queries while keys are still to change.
constexpr Index passing_steps = 1;

}  // namespace

double scarcity(const AttentionSample& sample) {
  return 1 + 8 * static_cast<double>(sample.sampled_inputs.cols()) /
                 static_cast<double>(sample.sampled_inputs.rows());
}

double mean_square(const MatrixD& input_moment) {
  return input_moment.diagonal().head(input_moment.rows() - 1).mean();
}

double asked_mean_square(const AttentionSample& sample) {
  const Index heads = std::max<Index>(1, static_cast<Index>(sample.head_moments.size()));
  double sum = 0;
  for (Index h = 0; h < heads; ++h) {
    sum += mean_square(sample.asked_moment(h));
  }
  return sum / static_cast<double>(heads);
}

QueryMoments asked_moments(const AttentionSample& sample) {
  return sample.by_head() ? QueryMoments(sample.head_moments) : QueryMoments(sample.asked_moment(0));
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
      limit_content_rank(attention, sample.input_moment, asked_moments(sample));
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
