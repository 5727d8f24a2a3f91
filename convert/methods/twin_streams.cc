#include "convert/methods/twin_streams.h"

#include <Eigen/Dense>
#include <algorithm>

#include "convert/latent/from_mla.h"
#include "convert/latent/refit.h"
#include "convert/plan/memory.h"
#include "formats/state_file.h"
#include "linalg/moments.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Tokens whose features are held before they are folded into the sums; fixed, so that sums are formed in one
// order.
constexpr Index batch_tokens = 8192;
// Tokens wanted for each feature of a refit before some are left out.
constexpr Index tokens_per_feature = 32;

}  // namespace

TwinStreams::TwinStreams(const Model& source, const Sequences& sequences, DType compute)
    : source_(source, sequences), converted_(source_), compute_(compute) {}

void TwinStreams::save(const std::filesystem::path& path, Index layers) const {
  write_state(path, layers, {bytes_of(source_.hidden()), bytes_of(converted_.hidden())}).commit();
}

std::optional<Index> TwinStreams::load(const std::filesystem::path& path) {
  return read_state(path, {writable_bytes_of(source_.hidden()), writable_bytes_of(converted_.hidden())});
}

MatrixF TwinStreams::converted_inputs(const RmsNorm& norm, Index sequence, bool affine) const {
  const Index hidden = converted_.hidden().cols();
  MatrixF out(converted_.length(), hidden + 1);
  out.leftCols(hidden) = normed(norm, converted_.sequence(sequence));
  out.col(hidden).setConstant(affine ? 1.0F : 0.0F);
  return out;
}

AttentionSample TwinStreams::sample_attention(const AttentionHalf& source, Index stride, bool affine,
                                              bool query_affine) {
  const Stage stage("sample");
  const RotaryTable table(rotary_of(source.attention), source_.length());
  const Index hidden = source_.hidden().cols();
  const Index length = source_.length();
  AttentionSample out;
  out.count = source_.count();
  out.length = length;
  out.stride = std::clamp<Index>(stride, 1, length);
  out.compute = compute_;
  out.inputs = [this, norm = source.input_norm, affine](Index sequence) {
    return converted_inputs(norm, sequence, affine);
  };
  // What differs between the two kinds of source: one key and value per group of heads, or one latent for
  // all.
  const auto* gqa = std::get_if<GqaAttention>(&source.attention);
  const auto* mla = std::get_if<LatentAttention>(&source.attention);
  const Index heads = gqa != nullptr ? gqa->heads : mla->heads;
  out.group_size = gqa != nullptr ? gqa->heads / gqa->kv_heads : heads;
  out.head_dim = gqa != nullptr ? gqa->head_dim : mla->rope_dim + mla->branches.front().down.out();
  const Index value_dim = gqa != nullptr ? gqa->head_dim : mla->branches.front().down.out();
  const float scale = gqa != nullptr ? gqa->scale : mla->scale;
  const MatrixF value_map = gqa != nullptr ? gqa->o.weight : mla_value_map(*mla);
  const bool low_rank_query = mla != nullptr && mla->q_down.out() > 0;

  const Index rows = out.per_sequence();
  out.sampled_inputs.resize(out.count * rows, hidden + 1);
  out.query_inputs.resize(low_rank_query ? out.count * rows : 0, low_rank_query ? mla->q_down.out() + 1 : 0);
  out.source_query.resize(out.count * rows, heads * out.head_dim);
  out.source_key.resize(out.count * length, heads / out.group_size * out.head_dim);
  out.target.resize(out.count * rows, hidden);
  MatrixF values(out.count * length, heads / out.group_size * value_dim);
  parallel_for(static_cast<std::size_t>(out.count), [&](std::size_t i) {
    const auto s = static_cast<Index>(i);
    const MatrixF x = normed(source.input_norm, source_.sequence(s));
    const MatrixF converted = converted_inputs(source.input_norm, s, affine);
    MatrixF query;
    if (gqa != nullptr) {
      GqaProjections projections = project(*gqa, x, table);
      source_.sequence(s) += gqa->o(attention_forward(*gqa, projections));
      out.source_key.middleRows(s * length, length) = projections.k;
      values.middleRows(s * length, length) = projections.v;
      query = std::move(projections.q);
    } else {
      MlaProjections projections = project(*mla, x, table);
      source_.sequence(s) += mla->o(attention_forward(*mla, x, table));
      out.source_key.middleRows(s * length, length) = projections.key;
      values.middleRows(s * length, length) = projections.key.rightCols(value_dim);
      query = std::move(projections.query);
    }
    for (Index j = 0; j < rows; ++j) {
      const Index at = out.position(s, j);
      const Index row = s * rows + j;
      out.sampled_inputs.row(row) = converted.row(at);
      out.source_query.row(row) = query.row(at) * scale;
      out.target.row(row) = source_.sequence(s).row(at) - converted_.sequence(s).row(at);
    }
    if (low_rank_query) {
      const MatrixF sampled = out.sampled_inputs.block(s * rows, 0, rows, hidden);
      out.query_inputs.middleRows(s * rows, rows) << query_features(*mla, sampled),
          VectorF::Constant(rows, query_affine ? 1.0F : 0.0F);
    }
  });
  const auto moment_of = [](const MatrixF& inputs) {
    MatrixD moment = MatrixD::Zero(inputs.cols(), inputs.cols());
    add_second_moment(inputs, moment);
    mirror_lower(moment);
    return MatrixD(moment / static_cast<double>(inputs.rows()));
  };
  out.input_moment = moment_of(out.sampled_inputs);
  if (low_rank_query) {
    out.query_moment = moment_of(out.query_inputs);
  } else if (affine && !query_affine) {
    out.query_inputs = out.sampled_inputs;
    out.query_inputs.col(hidden).setZero();
    out.query_moment = out.input_moment;
    out.query_moment.col(hidden).setZero();
    out.query_moment.row(hidden).setZero();
  }
  keep_weights(out, kept_weight_bytes);
  measure_value_spread(values, value_map, out);
  return out;
}

void TwinStreams::follow_source(const AttentionHalf& source) {
  const Stage stage("sample");
  const RotaryTable table(rotary_of(source.attention), source_.length());
  parallel_for(static_cast<std::size_t>(source_.count()), [&](std::size_t i) {
    auto hidden = source_.sequence(static_cast<Index>(i));
    hidden += attention_output(source.input_norm, source.attention, hidden, table);
  });
}

void TwinStreams::finish_attention(const AttentionHalf& source, LatentAttention& converted, bool refit,
                                   double ridge) {
  const Stage stage("refit");
  const RotaryTable table(converted.rotary, source_.length());
  const Index length = source_.length();
  const Index hidden = source_.hidden().cols();
  const Index features = converted.o.weight.cols();
  if (!refit) {
    parallel_for(static_cast<std::size_t>(source_.count()), [&](std::size_t i) {
      const auto s = static_cast<Index>(i);
      converted_.sequence(s) += attention_output(source.input_norm, converted, converted_.sequence(s), table);
    });
    return;
  }
  const bool affine = converted.o.bias.size() > 0;
  // Head outputs of the converted stream; what follows needs them again once o_proj is known.
  MatrixF mixed(source_.hidden().rows(), features);
  // Every so many-th token is enough: its errors are averaged over far more tokens than there are features.
  const Index thinning =
      std::clamp<Index>(source_.hidden().rows() / (tokens_per_feature * features), 1, length);
  RefitSums sums(hidden, features + 1);
  const Index batch = std::max<Index>(1, batch_tokens / length);
  for (Index first = 0; first < source_.count(); first += batch) {
    const Index count = std::min(batch, source_.count() - first);
    const Index kept = length / thinning;
    MatrixF sampled(count * kept, features + 1);
    sampled.col(features).setConstant(affine ? 1.0F : 0.0F);
    MatrixF errors(count * kept, hidden);
    parallel_for(static_cast<std::size_t>(count), [&](std::size_t i) {
      const Index s = first + static_cast<Index>(i);
      MatrixF a = attention_forward(converted, normed(source.input_norm, converted_.sequence(s)), table);
      mixed.middleRows(s * length, length) = a;
      auto here = errors.middleRows(static_cast<Index>(i) * kept, kept);
      for (Index j = 0; j < kept; ++j) {
        const Index at = (s % thinning) + j * thinning;
        here.row(j) = source_.sequence(s).row(at) - converted_.sequence(s).row(at);
        a.row(j) = a.row(at).eval();
      }
      a.conservativeResize(kept, features);
      sampled.block(static_cast<Index>(i) * kept, 0, kept, features) = a;
      here -= converted.o(a);
    });
    sums.add(sampled, errors);
  }
  const MatrixD delta =
      refit_delta(sums, ridge * ridge_for_scarcity(source_.hidden().rows() / thinning, features));
  converted.o.weight = (converted.o.weight.cast<double>() + delta.leftCols(features)).cast<float>();
  if (affine) {
    converted.o.bias = (converted.o.bias.cast<double>() + delta.col(features).transpose()).cast<float>();
  }
  parallel_for(static_cast<std::size_t>(source_.count()), [&](std::size_t i) {
    const auto s = static_cast<Index>(i);
    converted_.sequence(s) += converted.o(mixed.middleRows(s * length, length));
  });
}

void TwinStreams::finish_layer(const MlpHalf& source) {
  parallel_for(static_cast<std::size_t>(source_.count()), [&](std::size_t i) {
    add_mlp(source, source_.sequence(static_cast<Index>(i)));
    add_mlp(source, converted_.sequence(static_cast<Index>(i)));
  });
}

}  // namespace relatent
