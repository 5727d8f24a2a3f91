// Layers with sequences for the fits to work on, and what they make small, in double precision and one number
// at a time.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/sample.h"
#include "convert/latent/attention_fit.h"
#include "convert/latent/partition.h"
#include "tests/support/absorbed.h"

namespace relatent::testing_support {

// Two groups of two heads; keys and values are 8 numbers each.
inline const GqaSample fit_shape = {.hidden = 10, .heads = 4, .kv_heads = 2, .head_dim = 4};

struct FitSampleOptions {
  Index count = 1;
  Index length = 40;
  Index stride = 1;
  bool affine = true;
  double drift = 0;  // of the converted stream from the source's
  bool bias = false;
};

// A layer, sequences, and what a fit is told of them.
struct FitSample {
  LayerSample layer;  // x: the source's inputs of all sequences
  MatrixF values;     // of the source
  AttentionSample sample;

  MatrixD columns(Index sequence) const { return sample.inputs(sequence).cast<double>().transpose(); }
};

inline FitSample fit_sample(std::uint32_t seed, const FitSampleOptions& options) {
  Random random(seed);
  GqaSample gqa = fit_shape;
  gqa.q_bias = gqa.kv_bias = gqa.o_bias = options.bias;
  FitSample out;
  const GqaAttention attention = random_gqa(random, gqa);
  const Index hidden = fit_shape.hidden;
  const Index length = options.length;
  const MatrixF x = sample_inputs(random, options.count * length, hidden);
  const MatrixF drift = random.matrix(x.rows(), hidden, options.drift);
  out.layer = {attention, x, maps_of(attention), sample_moments(random, x, fit_shape.heads)};

  AttentionSample& sample = out.sample;
  sample.count = options.count;
  sample.length = length;
  sample.stride = options.stride;
  sample.head_dim = fit_shape.head_dim;
  sample.group_size = 2;
  auto inputs = std::make_shared<MatrixF>(x.rows(), hidden + 1);
  *inputs << x + drift, VectorF::Constant(x.rows(), options.affine ? 1.0F : 0.0F);
  sample.inputs = [inputs, length](Index s) { return MatrixF(inputs->middleRows(s * length, length)); };

  const Index rows = sample.per_sequence();
  sample.sampled_inputs.resize(options.count * rows, hidden + 1);
  sample.source_query.resize(options.count * rows, 16);
  sample.source_key.resize(options.count * length, 8);
  sample.target.resize(options.count * rows, hidden);
  out.values.resize(options.count * length, 8);
  const RotaryTable table(attention.rotary, length);
  for (Index s = 0; s < options.count; ++s) {
    const MatrixF here = x.middleRows(s * length, length);
    const GqaProjections projections = project(attention, here, table);
    const MatrixF output = output_of(attention, here);
    sample.source_key.middleRows(s * length, length) = projections.k;
    out.values.middleRows(s * length, length) = projections.v;
    for (Index i = 0; i < rows; ++i) {
      const Index at = sample.position(s, i);
      sample.sampled_inputs.row(s * rows + i) = inputs->row(s * length + at);
      sample.source_query.row(s * rows + i) = attention.scale * projections.q.row(at);
      // Off the source's stream there is that to make good, too.
      sample.target.row(s * rows + i) = output.row(at) - drift.row(s * length + at);
    }
  }
  const MatrixD sampled = sample.sampled_inputs.cast<double>();
  sample.input_moment = sampled.transpose() * sampled / static_cast<double>(sampled.rows());
  sample.query_inputs = sample.sampled_inputs;
  sample.query_moment = sample.input_moment;
  measure_value_spread(out.values, attention.o.weight, sample);
  return out;
}

// Every step-th sequence.
inline std::vector<Index> sequences_of(const AttentionSample& sample, Index step = 1) {
  std::vector<Index> out;
  for (Index s = 0; s < sample.count; s += step) {
    out.push_back(s);
  }
  return out;
}

// The source's scores of a sampled query with the keys that it sees.
inline VectorD source_scores(const AttentionSample& sample, Index sequence, Index head, Index i) {
  const Index d = sample.head_dim;
  const Index g = head / sample.group_size * d;
  const VectorD query = sample.source_query.row(sequence * sample.per_sequence() + i)
                            .segment(head * d, d)
                            .transpose()
                            .cast<double>();
  VectorD out(sample.position(sequence, i) + 1);
  for (Index n = 0; n < out.size(); ++n) {
    out(n) = query.dot(
        sample.source_key.row(sequence * sample.length + n).segment(g, d).transpose().cast<double>());
  }
  return out;
}

// The scores of one part of a head's group.
inline VectorD converted_scores(const AbsorbedAttention& a, const LatentGroup& group, const LatentPart& part,
                                const std::vector<VectorD>& keys, const VectorD& query, Index seen) {
  const VectorD asked = query_of_part(a, group, part, query);
  VectorD out(seen);
  for (Index n = 0; n < seen; ++n) {
    out(n) = asked.dot(key_of_part(a, group, part, keys[static_cast<std::size_t>(n)]));
  }
  return out;
}

inline double variance(const VectorD& weights, const VectorD& x) {
  const double mean = weights.dot(x);
  return weights.dot(VectorD(x.array() - mean).cwiseAbs2());
}

// J_h over those sequences, the mean over parts, [H].
inline VectorD score_errors(const FitSample& fit, const AbsorbedAttention& a,
                            const std::vector<Index>& sequences) {
  const AttentionSample& sample = fit.sample;
  VectorD out = VectorD::Zero(a.heads());
  for (const Index s : sequences) {
    const MatrixD columns = fit.columns(s);
    const std::vector<VectorD> keys = keys_by_the_book(a, columns);
    for (Index h = 0; h < a.heads(); ++h) {
      const LatentGroup& group = group_of(a, h);
      for (Index i = 0; i < sample.per_sequence(); ++i) {
        const Index m = sample.position(s, i);
        const VectorD source = source_scores(sample, s, h, i);
        const VectorD weights = softmax(source);
        const VectorD query = query_by_the_book(a, h, m, columns.col(m));
        for (const LatentPart& part : group.parts) {
          out(h) += variance(weights, source - converted_scores(a, group, part, keys, query, source.size())) /
                    static_cast<double>(group.parts.size());
        }
      }
    }
  }
  return out / static_cast<double>(static_cast<Index>(sequences.size()) * sample.per_sequence());
}

inline double score_error(const FitSample& fit, const AbsorbedAttention& a) {
  return score_errors(fit, a, sequences_of(fit.sample)).mean();
}

// What there is to say: the scores' own variance.
inline double score_variance(const FitSample& fit, AbsorbedAttention a) {
  for (MatrixD& query : a.query) {
    query.setZero();
  }
  return score_error(fit, a);
}

// E|target - output|² over those sequences, under the source's weights or the layer's own.
inline double output_error(const FitSample& fit, const AbsorbedAttention& a,
                           const std::vector<Index>& sequences, bool source_weights) {
  const AttentionSample& sample = fit.sample;
  double out = 0;
  for (const Index s : sequences) {
    const MatrixD columns = fit.columns(s);
    const std::vector<VectorD> keys = keys_by_the_book(a, columns);
    for (Index i = 0; i < sample.per_sequence(); ++i) {
      const Index m = sample.position(s, i);
      VectorD error = sample.target.row(s * sample.per_sequence() + i).transpose().cast<double>() - a.o_bias;
      for (Index h = 0; h < a.heads(); ++h) {
        const LatentGroup& group = group_of(a, h);
        const VectorD query = query_by_the_book(a, h, m, columns.col(m));
        VectorD latent = VectorD::Zero(group.rank);
        for (std::size_t b = 0; b < group.parts.size(); ++b) {
          const LatentPart& part = group.parts[b];
          const VectorD weights =
              softmax(source_weights ? source_scores(sample, s, h, i)
                                     : converted_scores(a, group, part, keys, query, m + 1));
          for (Index n = 0; n <= m; ++n) {
            const VectorD c =
                keys[static_cast<std::size_t>(n)].segment(a.rope_dim() + group.first, group.rank);
            latent.segment(part.first, part.rank) += weights(n) * c.segment(part.first, part.rank);
            if (b == 0) {
              latent.head(group.shared) += weights(n) * c.head(group.shared);
            }
          }
        }
        const Index w = a.v_dim();
        error -= a.o.middleCols(h * w, w) * (a.value_up[static_cast<std::size_t>(h)] * latent);
      }
      out += error.squaredNorm();
    }
  }
  return out / static_cast<double>(static_cast<Index>(sequences.size()) * sample.per_sequence());
}

// What fit_keys makes small. It looks at every second sequence.
inline double key_objective(const FitSample& fit, const AbsorbedAttention& a, double score_weight) {
  const std::vector<Index> sequences = sequences_of(fit.sample, 2);
  return score_weight * fit.sample.value_spread.dot(score_errors(fit, a, sequences)) +
         output_error(fit, a, sequences, true);
}

// No regularisation to speak of, and steps enough to solve the systems.
inline FitOptions exact(Index steps) {
  return {.steps = steps, .query_ridge = 1e-9, .key_ridge = 1e-9, .output_ridge = 1e-9, .score_weight = 0.3};
}

// Two of four rotary pairs and 5 of 16 latent coordinates.
inline AbsorbedAttention truncated(const FitSample& fit) {
  return absorbed_layer(fit.layer, 2, 5);
}

// Every rotary pair and values in full.
inline AbsorbedAttention lossless(const FitSample& fit) {
  return absorbed_layer(fit.layer, 4, 8);
}

inline const std::vector<FitSampleOptions> fit_sample_options = {
    {},
    {.bias = true},
    {.drift = 0.3},
    {.count = 3, .length = 25, .stride = 3, .drift = 0.3, .bias = true},
    {.count = 5, .length = 20, .stride = 2, .affine = false, .drift = 0.1},
    // More sequences than are added up at once, and positions left over at the end.
    {.count = 9, .length = 11, .stride = 4, .drift = 0.1},
};

inline std::string name_of(const FitSampleOptions& options) {
  return std::to_string(options.count) + " x " + std::to_string(options.length) + " / " +
         std::to_string(options.stride) + (options.affine ? " affine" : "") +
         (options.bias ? " biases" : "") + " drift " + std::to_string(options.drift);
}

// The slopes of a function of one matrix along ten directions, all told; exact for a quadratic.
template <typename Function>
double steepness(const Function& function, MatrixD& at) {
  Random random(100);
  const MatrixD here = at;
  double out = 0;
  for (Index i = 0; i < 10; ++i) {
    const MatrixD direction = random.matrix_d(here.rows(), here.cols());
    at = here + direction;
    const double above = function();
    at = here - direction;
    out += std::abs(above - function()) / 2;
  }
  at = here;
  return out;
}

inline bool same(const AbsorbedAttention& a, const AbsorbedAttention& b) {
  return a.key == b.key && a.query == b.query && a.value_up == b.value_up && a.o == b.o &&
         a.o_bias == b.o_bias;
}

struct PartedCase {
  Partition partition;
  Index rank;  // of the first group; each later one has one more
  Index key_rank;
};

inline const std::vector<PartedCase> parted_cases = {{{2, 1}, 4, 0}, {{4, 1}, 3, 0},  {{1, 2}, 7, 3},
                                                     {{1, 2}, 6, 0}, {{1, 4}, 11, 3}, {{2, 2}, 6, 2}};

inline std::string name_of(const PartedCase& test) {
  return std::to_string(test.partition.groups) + " groups of " + std::to_string(test.partition.parts) + ", " +
         std::to_string(test.key_rank) + " shared";
}

// Two of four rotary pairs; parts may ask for what is their own, as a fit lets them.
inline AbsorbedAttention parted(const FitSample& fit, const PartedCase& test) {
  const RotaryKey key = concentrated_key(fit.layer, 2);
  std::vector<JointLatent> latents;
  for (Index g = 0; g < test.partition.groups; ++g) {
    JointLatentOptions options{.rank = test.rank + g};
    if (test.partition.parts > 1) {
      options.key_rank = test.key_rank;
    }
    options.first_head = test.partition.first_head(g, 4);
    options.head_count = test.partition.first_head(g + 1, 4) - options.first_head;
    latents.push_back(joint_latent(fit.layer.maps, fit.layer.moments, key, options));
  }
  AbsorbedAttention out = absorb(fit.layer.maps, key, latents, test.partition.parts);
  Random random(101);
  for (MatrixD& query : out.query) {
    query += 0.05 * random.matrix_d(query.rows(), query.cols());
  }
  return out;
}

inline const std::vector<FitSampleOptions> parted_options = {
    {.drift = 0.3}, {.count = 3, .length = 25, .stride = 3, .drift = 0.3, .bias = true}};

// The same with a norm that every device holds.
inline void add_norm_rows(AbsorbedAttention& a) {
  Random random(102);
  a.norm_rows = random.matrix(6, fit_shape.hidden, 0.4);
  a.norm_eps = 0.1F;
}

}  // namespace relatent::testing_support
