#include "convert/sequential.h"

#include <Eigen/Dense>
#include <algorithm>

#include "convert/latent/refit.h"
#include "linalg/moments.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Tokens whose features are held before they are folded into the sums; fixed, so that sums are formed in one
// order.
constexpr Index batch_tokens = 8192;

// Calls body(first sequence, count) for batches of sequences.
template <typename Body>
void for_batches(const Stream& stream, const Body& body) {
  const Index batch = std::max<Index>(1, batch_tokens / stream.length());
  for (Index first = 0; first < stream.count(); first += batch) {
    body(first, std::min(batch, stream.count() - first));
  }
}

void apply_delta(const MatrixD& delta, Linear& map) {
  const Index features = map.weight.cols();
  map.weight = (map.weight.cast<double>() + delta.leftCols(features)).cast<float>();
  if (delta.cols() > features) {
    const RowVectorF change = delta.col(features).transpose().cast<float>();
    map.bias = map.bias.size() > 0 ? RowVectorF(map.bias + change) : change;
  }
}

}  // namespace

TwinStreams::TwinStreams(const Model& source, const Sequences& sequences)
    : source_(source, sequences), converted_(source_) {}

InputMoments TwinStreams::input_moments(const RmsNorm& input_norm) const {
  const Index hidden = source_.hidden().cols();
  const Index length = source_.length();
  InputMoments out{MatrixD::Zero(hidden, hidden), VectorD::Zero(hidden), MatrixD::Zero(hidden, hidden)};
  for_batches(source_, [&](Index first, Index count) {
    MatrixF from_source(count * length, hidden);
    MatrixF from_converted(count * length, hidden);
    parallel_for(static_cast<std::size_t>(count), [&](std::size_t i) {
      const auto s = static_cast<Index>(i);
      from_source.middleRows(s * length, length) = normed(input_norm, source_.sequence(first + s));
      from_converted.middleRows(s * length, length) = normed(input_norm, converted_.sequence(first + s));
    });
    add_second_moment(from_converted, out.converted);
    add_cross_moment(from_source, from_converted, out.cross);
    out.converted_mean += from_converted.cast<double>().colwise().sum().transpose();
  });
  const auto tokens = static_cast<double>(source_.hidden().rows());
  mirror_lower(out.converted);
  out.converted /= tokens;
  out.converted_mean /= tokens;
  out.cross /= tokens;
  return out;
}

void TwinStreams::attention(const Layer& source, LatentAttention& converted, const RefitOptions& options) {
  const auto& gqa = std::get<GqaAttention>(source.attention);
  const RotaryTable source_table(gqa.rotary, source_.length());
  const RotaryTable converted_table(converted.rotary, source_.length());
  const Index length = source_.length();
  const Index features = converted.o.weight.cols();
  // Head outputs of the converted stream; what follows needs them again once o_proj is known.
  MatrixF mixed(source_.hidden().rows(), features + 1);
  RefitSums sums(source_.hidden().cols(), features + 1);
  for_batches(source_, [&](Index first, Index count) {
    MatrixF errors(count * length, source_.hidden().cols());
    parallel_for(static_cast<std::size_t>(count), [&](std::size_t i) {
      const Index s = first + static_cast<Index>(i);
      source_.sequence(s) +=
          gqa.o(mix_heads(gqa, normed(source.input_norm, source_.sequence(s)), source_table));
      const MatrixF a =
          mix_heads(converted, normed(source.input_norm, converted_.sequence(s)), converted_table);
      mixed.block(s * length, 0, length, features) = a;
      mixed.block(s * length, features, length, 1).setOnes();
      errors.middleRows(static_cast<Index>(i) * length, length) =
          source_.sequence(s) - converted_.sequence(s) - converted.o(a);
    });
    if (options.output) {
      sums.add(mixed.middleRows(first * length, count * length), errors);
    }
  });
  if (options.output) {
    apply_delta(refit_delta(sums, options.ridge), converted.o);
  }
  parallel_for(static_cast<std::size_t>(source_.count()), [&](std::size_t i) {
    const auto s = static_cast<Index>(i);
    converted_.sequence(s) += converted.o(mixed.block(s * length, 0, length, features));
  });
}

void TwinStreams::mlp(const Layer& source, Linear& down, const RefitOptions& options) {
  const Index length = source_.length();
  const Index hidden = source_.hidden().cols();
  RefitSums sums(hidden, options.mlp ? down.weight.cols() : 0);
  for_batches(source_, [&](Index first, Index count) {
    MatrixF features(options.mlp ? count * length : 0, down.weight.cols());
    MatrixF errors(options.mlp ? count * length : 0, hidden);
    parallel_for(static_cast<std::size_t>(count), [&](std::size_t i) {
      const Index s = first + static_cast<Index>(i);
      add_mlp(source, source_.sequence(s));
      if (!options.mlp) {
        add_mlp(source, converted_.sequence(s));
        return;
      }
      const Index row = static_cast<Index>(i) * length;
      const MatrixF inner = mlp_inner(source, converted_.sequence(s));
      features.middleRows(row, length) = inner;
      errors.middleRows(row, length) = source_.sequence(s) - converted_.sequence(s) - down(inner);
    });
    if (options.mlp) {
      sums.add(features, errors);
    }
  });
  if (!options.mlp) {
    return;
  }
  apply_delta(refit_delta(sums, options.ridge), down);
  parallel_for(static_cast<std::size_t>(source_.count()), [&](std::size_t i) {
    const auto s = static_cast<Index>(i);
    converted_.sequence(s) += down(mlp_inner(source, converted_.sequence(s)));
  });
}

}  // namespace relatent
