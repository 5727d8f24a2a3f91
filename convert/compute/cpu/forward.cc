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

Index heads_of(const Attention& attention) {
  return std::visit([](const auto& kind) { return kind.heads; }, attention);
}

// Sums for the moments of normalised queries and keys, and of values.
class NormedHeadSums {
 public:
  // rows: of a batch.
  NormedHeadSums(const GqaAttention& attention, Index rows, Index hidden)
      : attention_(attention),
        features_(rows, 2 * attention.kv_heads * attention.head_dim),
        queries_(rows, attention.heads * attention.head_dim) {
    const Index d = attention.head_dim;
    sums_.feature_moment = MatrixD::Zero(features_.cols(), features_.cols());
    sums_.feature_mean = VectorD::Zero(features_.cols());
    sums_.query_moment = MatrixD::Zero(queries_.cols(), d);
    sums_.query_mean = VectorD::Zero(queries_.cols());
    sums_.cross = MatrixD::Zero(queries_.cols() + features_.cols() / 2, hidden);
  }

  // Rows first ... of the batch; callable from several threads for different rows.
  void keep(Index first, const GqaProjections& projections) {
    queries_.middleRows(first, projections.q.rows()) = projections.q;
    features_.middleRows(first, projections.k.rows()) << projections.k, projections.v;
  }

  // Adds the first so many rows of the batch; inputs: the same rows of x.
  void add(Index rows, const MatrixF& inputs) {
    const Index d = attention_.head_dim;
    add_second_moment(features_.topRows(rows), sums_.feature_moment);
    sums_.feature_mean += features_.topRows(rows).cast<double>().colwise().sum().transpose();
    sums_.query_mean += queries_.topRows(rows).cast<double>().colwise().sum().transpose();
    for (Index first = 0; first < queries_.cols(); first += d) {
      MatrixD of_head = MatrixD::Zero(d, d);
      add_second_moment(queries_.block(0, first, rows, d), of_head);
      mirror_lower(of_head);
      sums_.query_moment.middleRows(first, d) += of_head;
    }
    MatrixF normed(rows, sums_.cross.rows());
    normed << queries_.topRows(rows), features_.block(0, 0, rows, features_.cols() / 2);
    add_cross_moment(normed, inputs, sums_.cross);
  }

  NormedHeadMoments mean(double tokens) && {
    mirror_lower(sums_.feature_moment);
    sums_.feature_moment /= tokens;
    sums_.feature_mean /= tokens;
    sums_.query_moment /= tokens;
    sums_.query_mean /= tokens;
    sums_.cross /= tokens;
    return std::move(sums_);
  }

 private:
  const GqaAttention& attention_;
  MatrixF features_;
  MatrixF queries_;
  NormedHeadMoments sums_;
};

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
  const Index heads = heads_of(layer.attention);
  const Index hidden = stream.hidden().cols();
  const Index length = stream.length();
  const Index batch = sequences_at_once(length);
  LayerMoments out;
  out.tokens = stream.count() * length;
  out.second_moment = MatrixD::Zero(hidden, hidden);
  out.mean = VectorD::Zero(hidden);
  out.distance_mass = MatrixD::Zero(heads, length);
  MatrixF inputs(std::min(batch, stream.count()) * length, hidden);
  const auto* gqa = std::get_if<GqaAttention>(&layer.attention);
  std::optional<NormedHeadSums> normed_heads;
  if (gqa != nullptr && gqa->normed()) {
    normed_heads.emplace(*gqa, inputs.rows(), hidden);
  }
  // The heads' outputs, as attention_forward has them.
  const auto attend = [&](Index row, const MatrixF& x, DistanceMass& mass) {
    if (!normed_heads) {
      return attention_forward(layer.attention, x, table, &mass);
    }
    GqaProjections projections = project_unrotated(*gqa, x);
    normed_heads->keep(row, projections);
    rotate(*gqa, table, projections);
    return attention_forward(*gqa, projections, &mass);
  };
  for (Index first = 0; first < stream.count(); first += batch) {
    const Index count = std::min(batch, stream.count() - first);
    std::vector<DistanceMass> mass(static_cast<std::size_t>(count), {MatrixD::Zero(heads, length)});
    MatrixD sums(count, hidden);
    for_sequences(count, [&](Index i) {
      DistanceMass& here = mass[static_cast<std::size_t>(i)];
      auto rows = stream.sequence(first + i);
      const MatrixF x = normed(layer.input_norm, rows);
      inputs.middleRows(i * length, length) = x;
      sums.row(i) = x.cast<double>().colwise().sum();
      const MatrixF outputs = attend(i * length, x, here);
      if (!last) {
        rows += attention_output(output_projection(layer.attention), layer.attention_output_norm, outputs);
      }
    });
    if (!last) {
      add_mlp(layer, stream, first, count);
    }
    if (normed_heads) {
      normed_heads->add(count * length, inputs.topRows(count * length));
    }
    add_second_moment(inputs.topRows(count * length), out.second_moment);
    out.mean += sums.colwise().sum().transpose();
    for (const DistanceMass& m : mass) {
      out.distance_mass += m.sum;
    }
  }
  const auto tokens = static_cast<double>(out.tokens);
  out.second_moment /= tokens;
  mirror_lower(out.second_moment);
  out.mean /= tokens;
  out.distance_mass /= tokens;
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
