#include <utility>

#include "convert/compute/backend.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/conjugate_gradients.h"
#include "linalg/stages.h"

namespace relatent {

QueryFit::QueryFit(const AttentionSample& sample, const FitOptions& options) {
  const Stage stage("fit queries");
  problems_ =
      backend().query_problems(sample, options.query_ridge * scarcity(sample) * asked_mean_square(sample));
}

ScoreError QueryFit::operator()(Index steps, AbsorbedAttention& attention) const {
  const Stage stage("fit queries");
  const auto heads = static_cast<double>(attention.heads());
  ScoreError out;
  problems_->for_heads(attention, [&](Heads fitted, FitProblem& problem) {
    const auto first = attention.query.begin() + fitted.first;
    FitProblem::Start start = problem.start({first, first + fitted.count});
    const Solution solution = conjugate_gradients(std::move(start.residual), steps, problem);
    for (std::size_t h = 0; h < solution.x.size(); ++h) {
      first[static_cast<std::ptrdiff_t>(h)] += solution.x[h];
      out.before += start.error[h] / heads;
      out.after += (start.error[h] - solution.gain[h]) / heads;
    }
  });
  return out;
}

ScoreError fit_queries(const AttentionSample& sample, const FitOptions& options,
                       AbsorbedAttention& attention) {
  return QueryFit(sample, options)(options.steps, attention);
}

}  // namespace relatent
