// Least-squares fits of one latent layer to the source's attention on the calibration tokens: closed forms
// and a few conjugate-gradient steps on linear systems. No gradients are followed and nothing is trained.
//
// All of them compare a sample of queries m with all keys n under the source's own attention weights P_mn.
// Scores matter up to a constant per query, so the error of a head's scores is the within-query variance
//   J_h = E_m Σ_n P_mn ((s_mn - u_m·z_n) - mean_m)²,
// s being the source's scores and u·z the converted ones (absorbed.h). u = query[h] x̃ is linear in query[h]
// and z = key x̃ in key: each is a linear least-squares problem while the other rests. The expected rotation
// γ of rotary_key.h is the best single number per frequency; this finds the best linear map.
#pragma once

#include <algorithm>
#include <memory>

#include "convert/compute/attention_sample.h"
#include "convert/compute/fit_problem.h"
#include "convert/latent/absorbed.h"
#include "linalg/matrix.h"

namespace relatent {

struct FitOptions {
  bool queries = true;
  bool keys = true;
  bool refit = true;        // o_proj, on every token once the layer is fitted
  Index rounds = 2;         // queries and keys in turn; the last round ends with the queries
  Index steps = 2;          // conjugate-gradient steps of a fit; the queries take one before the last round
  Index output_rounds = 0;  // then queries and keys together against the layer's output (fit_output)
  Index tokens = 0;         // of the calibration that are used, whole sequences from the first; 0 = all
  Index stride = 8;         // every how many-th position of a sequence asks
  Index queries_per_unknown = 8;  // the stride shrinks until there are so many, or none is left out
  // Ridges, against the mean square of what the fitted map reads. Fewer queries than unknowns raise them.
  double query_ridge = 0.3;
  double key_ridge = 0.1;
  double output_ridge = 0.1;
  double score_weight = 0.3;  // of score errors against value errors when the keys are fitted

  // The stride that `count` tokens allow for inputs of this size.
  Index stride_for(Index count, Index hidden_size) const {
    return std::clamp<Index>(count / (queries_per_unknown * (hidden_size + 1)), 1, stride);
  }
};

// By how much ridges are raised where queries are few against what is unknown.
double scarcity(const AttentionSample& sample);

// The mean square of what a map reads, the constant apart.
double mean_square(const MatrixD& input_moment);
// The same of what queries act on, over all heads.
double asked_mean_square(const AttentionSample& sample);

// Second moments of what the sample's queries act on.
QueryMoments asked_moments(const AttentionSample& sample);

struct ScoreError {
  double before = 0;  // mean of J_h over heads
  double after = 0;   // the same by the fitted quadratic
};

// The fit of the queries of one layer; what its preconditioner knows of the inputs serves every call.
class QueryFit {
 public:
  // The sample must outlive the fit.
  QueryFit(const AttentionSample& sample, const FitOptions& options);
  // Changes every query[h]. Throws NumericalError when the sample holds NaN.
  ScoreError operator()(Index steps, AbsorbedAttention& attention) const;

 private:
  std::unique_ptr<QueryProblems> problems_;
};
ScoreError fit_queries(const AttentionSample& sample, const FitOptions& options,
                       AbsorbedAttention& attention);

// Changes rotary key and latent together, against scores (per head weighed by value_spread) and against the
// layer's output under the source's weights.
void fit_keys(const AttentionSample& sample, const FitOptions& options, AbsorbedAttention& attention);

// The alternation. It ends with queries of any rank: to_latent_attention brings them down. before is what the
// closed forms left, after what the last fit of the queries leaves.
ScoreError fit_attention(const AttentionSample& sample, const FitOptions& options,
                         AbsorbedAttention& attention);

// E|target - output|² over the sampled tokens, once o_proj is solved for.
double least_output_error(const AttentionSample& sample, const FitOptions& options, bool affine,
                          const AbsorbedAttention& attention);

struct OutputError {
  double before = 0;  // E|target - output|² over the sampled tokens, once o_proj suits the other fits
  double after = 0;
};

// Gauss-Newton on what the layer puts out, under its own attention weights: each round solves for o_proj,
// then moves all queries and the key map together by a few conjugate-gradient steps on the linearised
// problem, or by half or a quarter of that where the error would rise. Ends early where no part of a step
// lowers it. affine: o_proj has a bias. Leaves queries of the ranks that the written form has room for.
OutputError fit_output(const AttentionSample& sample, const FitOptions& options, bool affine,
                       AbsorbedAttention& attention);

}  // namespace relatent
