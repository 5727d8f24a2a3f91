#include <memory>
#include <utility>

#include "convert/compute/backend.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/conjugate_gradients.h"
#include "linalg/stages.h"

namespace relatent {

void fit_keys(const AttentionSample& sample, const FitOptions& options, AbsorbedAttention& attention) {
  const Stage stage("fit keys");
  const double ridge = options.key_ridge * scarcity(sample) * mean_square(sample.input_moment);
  const std::unique_ptr<FitProblem> problem =
      backend().key_problem(sample, attention, ridge, options.score_weight);
  Systems residual = problem->start({attention.key}).residual;
  attention.key += conjugate_gradients(std::move(residual), options.steps, *problem).x.front();
}

}  // namespace relatent
