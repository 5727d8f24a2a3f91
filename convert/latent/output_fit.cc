#include <memory>
#include <utility>

#include "convert/compute/backend.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/conjugate_gradients.h"
#include "convert/latent/norm_completion.h"
#include "convert/latent/refit.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

// Conjugate-gradient steps of one linearisation.
constexpr Index linear_steps = 2;
// A step that makes the error larger is halved so often before it is given up.
constexpr int halvings = 2;

MatrixD output_delta(const RefitSums& sums, Index features, double ridge) {
  return refit_delta(sums, ridge * ridge_for_scarcity(sums.tokens, features));
}

void solve_output(const OutputProblem& problem, bool affine, double ridge, AbsorbedAttention& attention) {
  const Index features = attention.o.cols();
  const MatrixD delta = output_delta(problem.sums(affine), features, ridge);
  attention.o += delta.leftCols(features);
  if (affine) {
    attention.o_bias += delta.col(features);
  }
}

// A part of the way that the linearised problem says.
AbsorbedAttention moved(const AbsorbedAttention& from, const Systems& way, double part,
                        const AttentionSample& sample) {
  AbsorbedAttention out = from;
  for (std::size_t h = 0; h < out.query.size(); ++h) {
    out.query[h] += part * way[h];
  }
  out.key += part * way.back();
  limit_content_rank(out, sample.input_moment, asked_moments(sample));
  if (out.norm.present()) {
    fit_norm(out.latent(), sample.sampled_inputs, sample.input_moment, out.norm);
  }
  return out;
}

}  // namespace

double least_output_error(const AttentionSample& sample, const FitOptions& options, bool affine,
                          const AbsorbedAttention& attention) {
  const Stage stage("choose latent");
  const RefitSums sums = backend().output_problem(sample, attention, 0, 0)->sums(affine);
  const MatrixD delta = output_delta(sums, attention.o.cols(), options.output_ridge);
  const MatrixD half = delta * sums.feature_moment.selfadjointView<Eigen::Lower>() - 2 * sums.error_moment;
  return (sums.error_square + half.cwiseProduct(delta).sum()) / static_cast<double>(sums.tokens);
}

OutputError fit_output(const AttentionSample& sample, const FitOptions& options, bool affine,
                       AbsorbedAttention& attention) {
  const Stage stage("fit output");
  const double query_ridge = options.query_ridge * scarcity(sample) * asked_mean_square(sample);
  const double key_ridge = options.key_ridge * scarcity(sample) * mean_square(sample.input_moment);
  const auto problem_of = [&](const AbsorbedAttention& at) {
    return backend().output_problem(sample, at, query_ridge, key_ridge);
  };
  OutputError out;
  if (options.output_rounds > 0) {
    limit_content_rank(attention, sample.input_moment, asked_moments(sample));
  }
  for (Index round = 0; round < options.output_rounds; ++round) {
    if (options.refit) {
      solve_output(*problem_of(attention), affine, options.output_ridge, attention);
    }
    const std::unique_ptr<OutputProblem> problem = problem_of(attention);
    FitProblem::Start start = problem->start({});
    const double before = start.error.front();
    out.before = round == 0 ? before : out.before;
    out.after = before;
    const Systems way =
        conjugate_gradients(std::move(start.residual), linear_steps, *problem, Coupling::joint).x;
    double part = 1;
    for (int i = 0; i <= halvings && out.after == before; ++i, part /= 2) {
      AbsorbedAttention tried = moved(attention, way, part, sample);
      if (const double error = problem_of(tried)->error(); error < before) {
        out.after = error;
        attention = std::move(tried);
      }
    }
    if (out.after == before) {
      break;
    }
  }
  return out;
}

}  // namespace relatent
