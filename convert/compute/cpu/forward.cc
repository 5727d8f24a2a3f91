#include "convert/compute/cpu/forward.h"

#include <Eigen/Dense>
#include <algorithm>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/mlp.h"
#include "linalg/moments.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Positions that go through an MLP at once.
constexpr Index mlp_rows = 256;
// Tokens whose normed inputs are held before they are folded into the moments. A fixed number, so that sums
// are formed in the same order for any thread count.
constexpr Index batch_tokens = 8192;

// Calls body(sequence) in parallel.
template <typename Body>
void for_sequences(Index count, const Body& body) {
  parallel_for(static_cast<std::size_t>(count), [&](std::size_t s) { body(static_cast<Index>(s)); });
}

// What the attention of a layer adds to the rows of one sequence: o(heads(x)) for x = norm h.
template <typename Kind>
MatrixF attention_output(const Kind& attention, const MatrixF& x, const RotaryTable& table,
                         DistanceMass* mass = nullptr) {
  return product(output_projection(attention), attention_forward(attention, x, table, mass));
}

double squared(const MatrixF& m) {
  return m.cast<double>().squaredNorm();
}

Index heads_of(const Attention& attention) {
  return std::visit([](const auto& kind) { return kind.heads; }, attention);
}

}  // namespace

void add_attention(const AttentionHalf& half, Stream& stream) {
  const RotaryTable table(rotary_of(half.attention), stream.length());
  for_sequences(stream.count(), [&](Index s) {
    auto hidden = stream.sequence(s);
    hidden += attention_output(half.attention, normed(half.input_norm, hidden), table);
  });
}

void add_attention(const RmsNorm& input_norm, std::span<const LatentAttention> parts, Stream& stream) {
  const RotaryTable table(parts.front().rotary, stream.length());
  for_sequences(stream.count(), [&](Index s) {
    auto hidden = stream.sequence(s);
    const MatrixF x = normed(input_norm, hidden);
    for (const LatentAttention& part : parts) {
      hidden += attention_output(part, x, table);
    }
  });
}

void add_mlp(const MlpHalf& half, Rows hidden) {
  const Stage stage("MLP");
  const MatrixF x = normed(half.post_attention_norm, hidden);
  // In slices: between the two products a row is several times as wide.
  for (Index first = 0; first < hidden.rows(); first += mlp_rows) {
    const Index count = std::min(mlp_rows, hidden.rows() - first);
    hidden.middleRows(first, count) += product(half.mlp.down, swiglu(half.mlp, x.middleRows(first, count)));
  }
  if (half.experts) {
    hidden += mix_experts(*half.experts, x);
  }
}

void add_mlp(const MlpHalf& half, Stream& stream) {
  for_sequences(stream.count(), [&](Index s) { add_mlp(half, stream.sequence(s)); });
}

LayerMoments observe(const Layer& layer, Stream& stream, bool last) {
  const Stage stage("observe");
  const RotaryTable table(rotary_of(layer.attention), stream.length());
  const Index heads = heads_of(layer.attention);
  const Index hidden = stream.hidden().cols();
  const Index length = stream.length();
  const Index batch = std::max<Index>(1, batch_tokens / length);
  LayerMoments out;
  out.tokens = stream.count() * length;
  out.second_moment = MatrixD::Zero(hidden, hidden);
  out.mean = VectorD::Zero(hidden);
  out.distance_mass = MatrixD::Zero(heads, length);
  MatrixF inputs(std::min(batch, stream.count()) * length, hidden);
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
      if (last) {
        attention_forward(layer.attention, x, table, &here);
      } else {
        rows += attention_output(layer.attention, x, table, &here);
        add_mlp(layer, rows);
      }
    });
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
    const MatrixF from_source =
        attention_output(source.attention, normed(source.input_norm, expected), source_table);
    const MatrixF from_converted =
        attention_output(converted.attention, normed(converted.input_norm, actual), converted_table);
    expected += from_source;
    actual += from_converted;
    add_mlp(source, expected);
    add_mlp(converted, actual);
    found[static_cast<std::size_t>(s)] = {squared(from_converted - from_source), squared(from_source),
                                          squared(actual - expected), squared(expected)};
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
