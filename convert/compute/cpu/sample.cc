#include "convert/compute/cpu/sample.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/fit_blocks.h"
#include "convert/compute/cpu/products.h"
#include "linalg/decompose.h"
#include "linalg/moments.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Tokens wanted for each feature of a refit before some are left out.
constexpr Index tokens_per_feature = 32;

// Rows of x̃ from those of x.
MatrixF with_constant(const MatrixF& x, bool affine) {
  MatrixF out(x.rows(), x.cols() + 1);
  out << x, VectorF::Constant(x.rows(), affine ? 1.0F : 0.0F);
  return out;
}

// What latents read, for rows of the layer's input; normed_heads: the source's where they read those.
MatrixF inputs_of(const GqaAttention* normed_heads, const MatrixF& x, bool affine) {
  return with_constant(normed_heads != nullptr ? key_features(*normed_heads, x) : x, affine);
}

const GqaAttention* normed_heads_of(const AttentionHalf& source, const SampleOptions& options) {
  return options.normed_heads ? &std::get<GqaAttention>(source.attention) : nullptr;
}

// Normalised queries, each head's with a constant behind it.
MatrixF queries_by_head(const GqaAttention& attention, const MatrixF& x, bool affine) {
  MatrixF queries = product(attention.q, x);
  normalise(attention.q_norm, queries);
  const Index d = attention.head_dim;
  MatrixF out(x.rows(), attention.heads * (d + 1));
  for (Index h = 0; h < attention.heads; ++h) {
    out.middleCols(h * (d + 1), d) = queries.middleCols(h * d, d);
    out.col(h * (d + 1) + d).setConstant(affine ? 1.0F : 0.0F);
  }
  return out;
}

// Of the mean square gain of a norm behind o_proj.
constexpr float small_gain = 0.1F;

// What one sequence of the source projects to, and what its attention puts out.
struct SourceAttention {
  MatrixF query;
  MatrixF key;
  MatrixF value;
  MatrixF output;
};

SourceAttention run_source(const GqaAttention& attention, const MatrixF& x, const RotaryTable& table) {
  GqaProjections projections = project(attention, x, table);
  MatrixF output = product(attention.o, attention_forward(attention, projections));
  return {std::move(projections.q), std::move(projections.k), std::move(projections.v), std::move(output)};
}

SourceAttention run_source(const LatentAttention& attention, const MatrixF& x, const RotaryTable& table) {
  MlaProjections projections = project(attention, x, table);
  MatrixF output = product(attention.o, attention_forward(attention, x, table));
  MatrixF value = projections.key.rightCols(attention.branches.front().down.out());
  return {std::move(projections.query), std::move(projections.key), std::move(value), std::move(output)};
}

// What differs between the two kinds of source: one key and value for each group of heads, or one latent for
// all.
struct SourceShape {
  Index heads;
  Index group_size;
  Index head_dim;
  Index value_dim;
  float scale;
};

SourceShape shape_of(const Attention& attention) {
  if (const auto* gqa = std::get_if<GqaAttention>(&attention)) {
    return {gqa->heads, gqa->heads / gqa->kv_heads, gqa->head_dim, gqa->head_dim, gqa->scale};
  }
  const auto& mla = std::get<LatentAttention>(attention);
  const Index rank = mla.branches.front().down.out();
  return {mla.heads, mla.heads, mla.rope_dim + rank, rank, mla.scale};
}

// The source's attention where its queries act on a latent of their own.
const LatentAttention* low_rank_query(const Attention& attention) {
  const auto* mla = std::get_if<LatentAttention>(&attention);
  return mla != nullptr && mla->q_down.out() > 0 ? mla : nullptr;
}

MatrixD second_moment_of(const MatrixF& rows) {
  MatrixD moment = MatrixD::Zero(rows.cols(), rows.cols());
  add_second_moment(rows, moment);
  mirror_lower(moment);
  return moment / static_cast<double>(rows.rows());
}

// The rows of one sequence.
void sample_sequence(const AttentionHalf& source, const SampleOptions& options, float scale, Index s,
                     const RotaryTable& table, const NormStep& step, const Stream& converted_stream,
                     Stream& source_stream, AttentionSample& out, MatrixF& values) {
  const Index length = out.length;
  const Index rows = out.per_sequence();
  auto expected = source_stream.sequence(s);
  const MatrixF x = normed(source.input_norm, expected);
  const MatrixF converted_x = normed(source.input_norm, converted_stream.sequence(s));
  const GqaAttention* normed_heads = normed_heads_of(source, options);
  const SourceAttention here =
      std::visit([&](const auto& kind) { return run_source(kind, x, table); }, source.attention);
  const MatrixF before = step.present() ? MatrixF(expected) : MatrixF();
  expected += normed(source.attention_output_norm, here.output);
  out.source_key.middleRows(s * length, length) = here.key;
  values.middleRows(s * length, length) = here.value;
  MatrixF sampled_x(rows, converted_x.cols());
  for (Index j = 0; j < rows; ++j) {
    const Index at = out.position(s, j);
    const Index row = s * rows + j;
    sampled_x.row(j) = converted_x.row(at);
    out.source_query.row(row) = here.query.row(at) * scale;
    if (step.present()) {
      const RowVectorF y = here.output.row(at);
      out.target.row(row) = y.array() + step.root(y) * step.factor.array() *
                                            (before.row(at) - converted_stream.sequence(s).row(at)).array();
    } else {
      out.target.row(row) = expected.row(at) - converted_stream.sequence(s).row(at);
    }
  }
  out.sampled_inputs.middleRows(s * rows, rows) = inputs_of(normed_heads, sampled_x, options.affine);
  if (const LatentAttention* mla = low_rank_query(source.attention)) {
    out.query_inputs.middleRows(s * rows, rows) =
        with_constant(query_features(*mla, sampled_x), options.query_affine);
  } else if (normed_heads != nullptr) {
    out.query_inputs.middleRows(s * rows, rows) =
        queries_by_head(*normed_heads, sampled_x, options.query_affine);
  }
}

}  // namespace

NormStep::NormStep(const RmsNorm& norm) : eps(norm.eps) {
  if (norm.present()) {
    const auto square = norm.gain.array().square();
    factor = norm.gain.array() / (square + small_gain * square.mean());
  }
}

float NormStep::root(const RowVectorF& y) const {
  return std::sqrt(y.squaredNorm() / static_cast<float>(y.size()) + eps);
}

AttentionSample sample_attention(const AttentionHalf& source, const MatrixF& value_map,
                                 const SampleOptions& options, Stream& source_stream,
                                 const Stream& converted_stream) {
  const Stage stage("sample");
  const Index hidden = source_stream.hidden().cols();
  const Index length = source_stream.length();
  const SourceShape shape = shape_of(source.attention);
  const LatentAttention* mla = low_rank_query(source.attention);
  AttentionSample out;
  out.count = source_stream.count();
  out.length = length;
  out.stride = std::clamp<Index>(options.stride, 1, length);
  out.compute = options.compute;
  out.group_size = shape.group_size;
  out.head_dim = shape.head_dim;
  out.softcap = std::visit([](const auto& kind) { return kind.softcap; }, source.attention);
  const GqaAttention* normed_heads = normed_heads_of(source, options);
  out.inputs = [&converted_stream, norm = source.input_norm, normed_heads,
                affine = options.affine](Index sequence) {
    return inputs_of(normed_heads, normed(norm, converted_stream.sequence(sequence)), affine);
  };
  const Index queries = out.count * out.per_sequence();
  const Index keys = shape.heads / shape.group_size;
  const Index inputs = normed_heads != nullptr ? normed_heads->k.out() + normed_heads->v.out() : hidden;
  out.sampled_inputs.resize(queries, inputs + 1);
  if (mla != nullptr) {
    out.query_inputs.resize(queries, mla->q_down.out() + 1);
  } else if (normed_heads != nullptr) {
    out.query_inputs.resize(queries, shape.heads * (shape.head_dim + 1));
  }
  out.source_query.resize(queries, shape.heads * shape.head_dim);
  out.source_key.resize(out.count * length, keys * shape.head_dim);
  out.target.resize(queries, hidden);
  MatrixF values(out.count * length, keys * shape.value_dim);
  const RotaryTable table(rotary_of(source.attention), length);
  const NormStep step(source.attention_output_norm);
  for_sequences(out.count, [&](Index s) {
    sample_sequence(source, options, shape.scale, s, table, step, converted_stream, source_stream, out,
                    values);
  });
  out.input_moment = second_moment_of(out.sampled_inputs);
  if (mla != nullptr) {
    out.query_moment = second_moment_of(out.query_inputs);
  } else if (normed_heads != nullptr) {
    const Index width = shape.head_dim + 1;
    for (Index h = 0; h < shape.heads; ++h) {
      out.head_moments.push_back(second_moment_of(out.query_inputs.middleCols(h * width, width)));
    }
  } else if (options.affine && !options.query_affine) {
    out.query_inputs = out.sampled_inputs;
    out.query_inputs.col(hidden).setZero();
    out.query_moment = out.input_moment;
    out.query_moment.col(hidden).setZero();
    out.query_moment.row(hidden).setZero();
  }
  keep_weights(out, options.weight_bytes);
  measure_value_spread(values, value_map, out);
  return out;
}

HeadOutputs head_outputs(const RmsNorm& input_norm, const LatentAttention& attention,
                         const RmsNorm& output_norm, const Stream& source_stream,
                         const Stream& converted_stream) {
  const RotaryTable table(attention.rotary, source_stream.length());
  const Index tokens = source_stream.hidden().rows();
  const Index length = source_stream.length();
  const Index hidden = source_stream.hidden().cols();
  const Index features = attention.o.weight.cols();
  const bool affine = attention.o.bias.size() > 0;
  const NormStep step(output_norm);
  // Every so many-th token is enough: its errors are averaged over far more tokens than there are features.
  const Index thinning = std::clamp<Index>(tokens / (tokens_per_feature * features), 1, length);
  const Index kept = length / thinning;
  HeadOutputs out;
  out.values.resize(tokens, features);
  out.sums = {MatrixD::Zero(features + 1, features + 1), MatrixD::Zero(hidden, features + 1),
              tokens / thinning};
  const Index batch = sequences_at_once(length);
  for (Index first = 0; first < source_stream.count(); first += batch) {
    const Index count = std::min(batch, source_stream.count() - first);
    MatrixF sampled(count * kept, features + 1);
    sampled.col(features).setConstant(affine ? 1.0F : 0.0F);
    MatrixF errors(count * kept, hidden);
    for_sequences(count, [&](Index i) {
      const Index s = first + i;
      MatrixF a = attention_forward(attention, normed(input_norm, converted_stream.sequence(s)), table);
      out.values.middleRows(s * length, length) = a;
      auto here = errors.middleRows(i * kept, kept);
      for (Index j = 0; j < kept; ++j) {
        const Index at = (s % thinning) + j * thinning;
        here.row(j) = source_stream.sequence(s).row(at) - converted_stream.sequence(s).row(at);
        a.row(j) = a.row(at).eval();
      }
      a.conservativeResize(kept, features);
      sampled.block(i * kept, 0, kept, features) = a;
      const MatrixF output = product(attention.o, a);
      if (!step.present()) {
        here -= output;
        return;
      }
      here -= normed(output_norm, output);
      here.array().rowwise() *= step.factor.array();
      // Errors of the stream weigh alike, whatever the norm divides by.
      for (Index j = 0; j < kept; ++j) {
        sampled.row(i * kept + j) /= step.root(output.row(j));
      }
    });
    add_second_moment(sampled, out.sums.feature_moment);
    add_cross_moment(errors, sampled, out.sums.error_moment);
  }
  return out;
}

void add_outputs(const Linear& o, const MatrixF& head_outputs, const RmsNorm& output_norm, Stream& stream) {
  for_sequences(stream.count(), [&](Index s) {
    stream.sequence(s) +=
        attention_output(o, output_norm, head_outputs.middleRows(s * stream.length(), stream.length()));
  });
}

void keep_weights(AttentionSample& sample, std::size_t bytes) {
  const Heads heads{0, source_heads(sample)};
  std::size_t needed = 0;
  for (const Block& block : blocks_of(sample, 0)) {
    needed += static_cast<std::size_t>(heads.count * block.rows * block.columns) * sizeof(float);
  }
  if (needed * static_cast<std::size_t>(sample.count) > bytes) {
    return;
  }
  sample.weights = parallel_made(static_cast<std::size_t>(sample.count), [&](std::size_t s) {
    std::vector<MatrixF> kept;
    for (const Block& block : blocks_of(sample, static_cast<Index>(s))) {
      form_weights(sample, block, heads, kept.emplace_back());
    }
    return kept;
  });
}

void measure_value_spread(const MatrixF& source_value, const MatrixF& o, AttentionSample& sample) {
  const Stage stage("value spread");
  const Index heads = source_heads(sample);
  const Index d = o.cols() / heads;
  const std::vector<MatrixF> roots = parallel_made(static_cast<std::size_t>(heads), [&](std::size_t h) {
    const MatrixD head = o.middleCols(static_cast<Index>(h) * d, d).cast<double>();
    return MatrixF(symmetric_root(head.transpose() * head, 0).root.cast<float>());
  });
  VectorD sum = VectorD::Zero(heads);
  in_batches<double>(
      every(sample.count, moment_sequences), heads, sequences_at_once(sample.length),
      [&](Index i, Index h, double& slot) {
        const Index s = i * moment_sequences;
        MatrixF values(sample.length, d);
        values.noalias() =
            source_value.block(s * sample.length, h / sample.group_size * d, sample.length, d) *
            roots[static_cast<std::size_t>(h)];
        const VectorF squares = values.rowwise().squaredNorm();
        MatrixF scratch;
        MatrixF mean;
        for (const Block& block : blocks_of(sample, s)) {
          const auto weights = source_weights(sample, block, {h, 1}, scratch);
          mean.resize(block.rows, d);
          mean.noalias() = weights * values.topRows(block.columns);
          slot += static_cast<double>((weights * squares.head(block.columns)).sum()) -
                  static_cast<double>(mean.squaredNorm());
        }
      },
      [&](Index, const std::vector<double>& slots) {
        for (std::size_t i = 0; i < slots.size(); ++i) {
          sum(static_cast<Index>(i) % heads) += slots[i];
        }
      });
  sample.value_spread =
      (sum / static_cast<double>(every(sample.count, moment_sequences) * sample.per_sequence())).cwiseMax(0);
}

}  // namespace relatent
