#include "convert/compute/cpu/forward.h"

#include <Eigen/Dense>
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/mlp.h"
#include "convert/compute/cpu/sequences.h"
#include "linalg/moments.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

// What the attention of a layer adds to the rows of one sequence.
MatrixF attention_output(const AttentionHalf& half, const ConstRows& hidden, const RotaryTable& table) {
  const MatrixF x = normed(half.input_norm, hidden);
  return attention_output(output_projection(half.attention), half.attention_output_norm,
                          attention_forward(half.attention, x, table));
}

double squared(const MatrixF& m) {
  return m.cast<double>().squaredNorm();
}

// Of the weight that a token has in the moments of what keys and values are made of, the part that every
// token has; the rest goes by the root of the attention that it receives.
constexpr double equal_weight = 0.1;

// Roots of the weights of a sequence's tokens, whose mean is 1.
VectorF weight_roots(const VectorD& received) {
  const VectorD root = received.cwiseMax(0).cwiseSqrt();
  const double mean = root.mean();
  VectorD weight = VectorD::Ones(root.size());
  if (mean > 0) {
    weight = equal_weight + (1 - equal_weight) * root.array() / mean;
  }
  return weight.cwiseSqrt().cast<float>();
}

// Sums for the moments of normalised queries and keys, and of values.
class NormedHeadSums {
 public:
  // rows: of a batch.
  NormedHeadSums(Index heads, Index kv_heads, Index head_dim, Index rows, Index hidden)
      : head_dim_(head_dim), features_(rows, 2 * kv_heads * head_dim), queries_(rows, heads * head_dim) {
    sums_.feature_moment = MatrixD::Zero(features_.cols(), features_.cols());
    sums_.feature_mean = VectorD::Zero(features_.cols());
    sums_.query_moment = MatrixD::Zero(queries_.cols(), head_dim);
    sums_.query_mean = VectorD::Zero(queries_.cols());
    query_cross_ = MatrixD::Zero(queries_.cols(), hidden);
    key_cross_ = MatrixD::Zero(features_.cols() / 2, hidden);
  }

  // Rows first ... of the batch: q̂ and f. Callable from several threads for different rows.
  void keep(Index first, const MatrixF& queries, const MatrixF& features) {
    queries_.middleRows(first, queries.rows()) = queries;
    features_.middleRows(first, features.rows()) = features;
  }

  // Adds the queries of the first rows of the batch; inputs: the same rows of x.
  void add_queries(const MatrixF& inputs) {
    const Index rows = inputs.rows();
    const Index d = head_dim_;
    sums_.query_mean += queries_.topRows(rows).cast<double>().colwise().sum().transpose();
    for (Index first = 0; first < queries_.cols(); first += d) {
      MatrixD of_head = MatrixD::Zero(d, d);
      add_second_moment(queries_.block(0, first, rows, d), of_head);
      mirror_lower(of_head);
      sums_.query_moment.middleRows(first, d) += of_head;
    }
    add_cross_moment(queries_.topRows(rows), inputs, query_cross_);
  }

  // The same of keys and values; roots: of the rows' weights, inputs times which are given.
  void add_features(const VectorF& roots, const MatrixF& inputs) {
    const Index rows = inputs.rows();
    const Index keys = features_.cols() / 2;
    features_.topRows(rows).array().colwise() *= roots.array();
    add_second_moment(features_.topRows(rows), sums_.feature_moment);
    sums_.feature_mean += features_.topRows(rows).transpose().cast<double>() * roots.cast<double>();
    add_cross_moment(features_.block(0, 0, rows, keys), inputs, key_cross_);
  }

  NormedHeadMoments mean(double tokens) && {
    mirror_lower(sums_.feature_moment);
    sums_.feature_moment /= tokens;
    sums_.feature_mean /= tokens;
    sums_.query_moment /= tokens;
    sums_.query_mean /= tokens;
    sums_.cross.resize(query_cross_.rows() + key_cross_.rows(), key_cross_.cols());
    sums_.cross << query_cross_, key_cross_;
    sums_.cross /= tokens;
    return std::move(sums_);
  }

 private:
  Index head_dim_;
  MatrixF features_;
  MatrixF queries_;
  NormedHeadMoments sums_;
  MatrixD query_cross_;
  MatrixD key_cross_;
};

std::optional<NormedHeadSums> normed_head_sums(const Attention& attention, Index rows, Index hidden) {
  if (const auto* gqa = std::get_if<GqaAttention>(&attention)) {
    return gqa->normed() ? std::optional<NormedHeadSums>(std::in_place, gqa->heads, gqa->kv_heads,
                                                         gqa->head_dim, rows, hidden)
                         : std::nullopt;
  }
  const auto& latent = std::get<LatentAttention>(attention);
  if (!latent.normed_heads) {
    return std::nullopt;
  }
  const NormedHeads& heads = *latent.normed_heads;
  return std::optional<NormedHeadSums>(std::in_place, latent.heads, heads.k.out() / heads.head_dim,
                                       heads.head_dim, rows, hidden);
}

// The heads' outputs, as attention_forward has them; of normalised heads q̂ and f are kept.
MatrixF observed_outputs(const Attention& attention, const MatrixF& x, const RotaryTable& table, Index row,
                         std::optional<NormedHeadSums>& normed_heads, AttentionSums& sums) {
  const auto* gqa = std::get_if<GqaAttention>(&attention);
  if (!normed_heads) {
    return attention_forward(attention, x, table, &sums);
  }
  if (gqa == nullptr) {
    const auto& latent = std::get<LatentAttention>(attention);
    normed_heads->keep(row, query_features(latent, x), key_features(*latent.normed_heads, x));
    return attention_forward(latent, x, table, &sums);
  }
  GqaProjections projections = project_unrotated(*gqa, x);
  MatrixF features(x.rows(), 2 * projections.k.cols());
  features << projections.k, projections.v;
  normed_heads->keep(row, projections.q, features);
  rotate(*gqa, table, projections);
  return attention_forward(*gqa, projections, &sums);
}

}  // namespace

void add_attention(const AttentionHalf& half, Stream& stream) {
  const RotaryTable table(rotary_of(half.attention), stream.length());
  for_sequences(stream.count(), [&](Index s) {
    auto hidden = stream.sequence(s);
    hidden += attention_output(half, hidden, table);
  });
}

void add_attention(const RmsNorm& input_norm, std::span<const LatentAttention> parts,
                   const RmsNorm& output_norm, Stream& stream) {
  const RotaryTable table(parts.front().rotary, stream.length());
  for_sequences(stream.count(), [&](Index s) {
    auto hidden = stream.sequence(s);
    const MatrixF x = normed(input_norm, hidden);
    MatrixF sum = MatrixF::Zero(output_norm.present() ? x.rows() : 0, x.cols());
    for (const LatentAttention& part : parts) {
      const MatrixF added = product(part.o, attention_forward(part, x, table));
      if (output_norm.present()) {
        sum += added;
      } else {
        hidden += added;
      }
    }
    if (output_norm.present()) {
      normalise(output_norm, sum);
      hidden += sum;
    }
  });
}

void add_mlp(const MlpHalf& half, Stream& stream) {
  const Index batch = half.experts ? sequences_at_once(stream.length()) : stream.count();
  for (Index first = 0; first < stream.count(); first += batch) {
    add_mlp(half, stream, first, std::min(batch, stream.count() - first));
  }
}

void add_mlp(const MlpHalf& half, Stream& stream, Index first, Index count) {
  const Index length = stream.length();
  const Index width = stream.hidden().cols();
  // What the experts read, of all sequences.
  MatrixF inputs(half.experts ? count * length : 0, width);
  // A norm behind the block is of what both add together.
  const bool waits = half.experts && half.mlp_output_norm.present();
  MatrixF sum = MatrixF::Zero(waits ? count * length : 0, width);
  for_sequences(count, [&](Index i) {
    auto hidden = stream.sequence(first + i);
    const MatrixF x = normed(half.post_attention_norm, hidden);
    if (half.mlp.down.out() > 0) {
      MatrixF added = shared_output(half, x);
      if (waits) {
        sum.middleRows(i * length, length) = added;
      } else {
        normalise(half.mlp_output_norm, added);
        hidden += added;
      }
    }
    if (half.experts) {
      inputs.middleRows(i * length, length) = x;
    }
  });
  if (!half.experts) {
    return;
  }
  MatrixF mixed = mix_experts(*half.experts, inputs);
  if (waits) {
    mixed += sum;
    normalise(half.mlp_output_norm, mixed);
  }
  stream.hidden().middleRows(first * length, count * length) += mixed;
}

LayerMoments observe(const Layer& layer, Stream& stream, bool last) {
  const Stage stage("observe");
  const RotaryTable table(rotary_of(layer.attention), stream.length());
  const std::vector<MatrixF> roots = output_roots(layer.attention);
  const auto heads = static_cast<Index>(roots.size());
  const Index hidden = stream.hidden().cols();
  const Index length = stream.length();
  const Index batch = sequences_at_once(length);
  LayerMoments out;
  out.tokens = stream.count() * length;
  out.second_moment = MatrixD::Zero(hidden, hidden);
  out.mean = VectorD::Zero(hidden);
  out.received_moment = MatrixD::Zero(hidden, hidden);
  out.received_mean = VectorD::Zero(hidden);
  out.distance_mass = MatrixD::Zero(heads, length);
  out.mass_square = VectorD::Zero(heads);
  out.score_effect = VectorD::Zero(heads);
  MatrixF inputs(std::min(batch, stream.count()) * length, hidden);
  std::optional<NormedHeadSums> normed_heads = normed_head_sums(layer.attention, inputs.rows(), hidden);
  for (Index first = 0; first < stream.count(); first += batch) {
    const Index count = std::min(batch, stream.count() - first);
    const Index rows = count * length;
    std::vector<AttentionSums> sums(static_cast<std::size_t>(count), AttentionSums(heads, length, &roots));
    MatrixD means(count, hidden);
    MatrixD received_means(count, hidden);
    VectorF weights(rows);  // roots of them
    for_sequences(count, [&](Index i) {
      AttentionSums& here = sums[static_cast<std::size_t>(i)];
      auto sequence = stream.sequence(first + i);
      const MatrixF x = normed(layer.input_norm, sequence);
      inputs.middleRows(i * length, length) = x;
      const MatrixF outputs = observed_outputs(layer.attention, x, table, i * length, normed_heads, here);
      const VectorF root = weight_roots(here.received);
      weights.segment(i * length, length) = root;
      means.row(i) = x.cast<double>().colwise().sum();
      received_means.row(i) = root.cast<double>().cwiseAbs2().transpose() * x.cast<double>();
      if (!last) {
        sequence +=
            attention_output(output_projection(layer.attention), layer.attention_output_norm, outputs);
      }
    });
    if (!last) {
      add_mlp(layer, stream, first, count);
    }
    add_second_moment(inputs.topRows(rows), out.second_moment);
    if (normed_heads) {
      normed_heads->add_queries(inputs.topRows(rows));
    }
    inputs.topRows(rows).array().colwise() *= weights.head(rows).array();
    add_second_moment(inputs.topRows(rows), out.received_moment);
    if (normed_heads) {
      normed_heads->add_features(weights, inputs.topRows(rows));
    }
    out.mean += means.colwise().sum().transpose();
    out.received_mean += received_means.colwise().sum().transpose();
    for (const AttentionSums& here : sums) {
      out.distance_mass += here.distance_mass;
      out.mass_square += here.mass_square;
      out.score_effect += here.score_effect;
    }
  }
  const auto tokens = static_cast<double>(out.tokens);
  for (MatrixD* moment : {&out.second_moment, &out.received_moment}) {
    *moment /= tokens;
    mirror_lower(*moment);
  }
  out.mean /= tokens;
  out.received_mean /= tokens;
  out.distance_mass /= tokens;
  out.mass_square /= tokens;
  out.score_effect /= tokens;
  if (normed_heads) {
    out.normed_heads = std::move(*normed_heads).mean(tokens);
  }
  return out;
}

LayerDifference run_side_by_side(const Layer& source, Stream& source_stream, const Layer& converted,
                                 Stream& converted_stream) {
  const RotaryTable source_table(rotary_of(source.attention), source_stream.length());
  const RotaryTable converted_table(rotary_of(converted.attention), source_stream.length());
  std::vector<LayerDifference> found(static_cast<std::size_t>(source_stream.count()));
  for_sequences(source_stream.count(), [&](Index s) {
    auto expected = source_stream.sequence(s);
    auto actual = converted_stream.sequence(s);
    LayerDifference& here = found[static_cast<std::size_t>(s)];
    const MatrixF from_source = attention_output(source, expected, source_table);
    const MatrixF from_converted = attention_output(converted, actual, converted_table);
    expected += from_source;
    actual += from_converted;
    here.attention = squared(from_converted - from_source);
    here.attention_source = squared(from_source);
  });
  add_mlp(source, source_stream);
  add_mlp(converted, converted_stream);
  for_sequences(source_stream.count(), [&](Index s) {
    LayerDifference& here = found[static_cast<std::size_t>(s)];
    here.residual = squared(converted_stream.sequence(s) - source_stream.sequence(s));
    here.residual_source = squared(source_stream.sequence(s));
  });
  LayerDifference sum;
  for (const LayerDifference& one : found) {
    sum.attention += one.attention;
    sum.attention_source += one.attention_source;
    sum.residual += one.residual;
    sum.residual_source += one.residual_source;
  }
  return sum;
}

}  // namespace relatent
