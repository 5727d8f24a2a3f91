#include "convert/compute/cpu/logits.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "convert/compute/cpu/products.h"
#include "convert/compute/cpu/sequences.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Rows of the output head decoded at once.
constexpr Index vocab_slice = 4096;
// Positions whose logits are formed at once.
constexpr Index row_block = 128;

// What has been seen of one position's logits so far.
struct Position {
  float source_peak = -std::numeric_limits<float>::infinity();
  float converted_peak = -std::numeric_limits<float>::infinity();
  std::int32_t source_top = -1;
  std::int32_t converted_top = -1;
  double source_sum = 0;  // Σ exp(logit - peak)
  double converted_sum = 0;
  double cross = 0;         // Σ exp(source - source_peak) (source - converted)
  float source_target = 0;  // logit of the true next token
  float converted_target = 0;
  bool finite = true;
};

struct Totals {
  double diff_squared = 0;
  double source_squared = 0;
  double max_abs = 0;
};

// Folds one slice of logits into the running peak and sum; returns the factor that earlier sums were scaled
// by.
double fold(const Eigen::Ref<const RowVectorF>& logits, Index first, float& peak, std::int32_t& top,
            double& sum) {
  Index at = 0;
  const float here = logits.maxCoeff(&at);
  double factor = 1;
  if (here > peak) {
    factor = std::exp(static_cast<double>(peak) - static_cast<double>(here));
    peak = here;
    top = static_cast<std::int32_t>(first + at);
    sum *= factor;
  }
  sum += static_cast<double>((logits.array() - peak).exp().sum());
  return factor;
}

// x becomes cap tanh(x / cap), where the model caps its logits.
void cap_logits(const Model& model, MatrixF& logits) {
  if (const std::optional<double> cap = model.config().final_logit_softcapping) {
    const auto size = static_cast<float>(*cap);
    logits = size * (logits.array() / size).tanh();
  }
}

MatrixF final_states(const Model& model, const Stream& stream) {
  const RmsNorm norm = model.final_norm();
  MatrixF out = stream.hidden();
  for_sequences(stream.count(), [&](Index s) {
    auto rows = out.middleRows(s * stream.length(), stream.length());
    rows = normed(norm, rows);
  });
  return out;
}

// Folds both models' logits of tokens first, first + 1, ... into what has been seen of a position.
void compare_slice(const Eigen::Ref<const RowVectorF>& source, const Eigen::Ref<const RowVectorF>& converted,
                   Index first, Position& here, Totals& total) {
  const RowVectorF diff = source - converted;
  const auto diff_squared = static_cast<double>(diff.squaredNorm());
  if (!std::isfinite(diff_squared)) {
    here.finite = false;
    return;
  }
  total.diff_squared += diff_squared;
  total.source_squared += static_cast<double>(source.squaredNorm());
  total.max_abs = std::max(total.max_abs, static_cast<double>(diff.cwiseAbs().maxCoeff()));
  here.cross *= fold(source, first, here.source_peak, here.source_top, here.source_sum);
  here.cross += static_cast<double>(((source.array() - here.source_peak).exp() * diff.array()).sum());
  fold(converted, first, here.converted_peak, here.converted_top, here.converted_sum);
}

LogitComparison means_of(const std::vector<Position>& positions, const std::vector<Totals>& totals,
                         Index length) {
  LogitComparison out;
  double source_nll = 0;
  double converted_nll = 0;
  double kl_sum = 0;
  std::int64_t agreed = 0;
  for (std::size_t row = 0; row < positions.size(); ++row) {
    const Position& here = positions[row];
    if (!here.finite) {
      ++out.non_finite;
      continue;
    }
    const double source_lse = here.source_peak + std::log(here.source_sum);
    const double converted_lse = here.converted_peak + std::log(here.converted_sum);
    const double kl = std::max(0.0, here.cross / here.source_sum - source_lse + converted_lse);
    kl_sum += kl;
    out.max_kl = std::max(out.max_kl, kl);
    agreed += here.source_top == here.converted_top ? 1 : 0;
    if (static_cast<Index>(row) % length + 1 < length) {
      source_nll += source_lse - here.source_target;
      converted_nll += converted_lse - here.converted_target;
      ++out.tokens;
    }
  }
  double diff_squared = 0;
  double source_squared = 0;
  for (const Totals& total : totals) {
    diff_squared += total.diff_squared;
    source_squared += total.source_squared;
    out.max_abs_logit_diff = std::max(out.max_abs_logit_diff, total.max_abs);
  }
  const auto rows = static_cast<double>(positions.size());
  out.source_nll = source_nll / static_cast<double>(out.tokens);
  out.converted_nll = converted_nll / static_cast<double>(out.tokens);
  out.mean_kl = kl_sum / rows;
  out.top1_agreement = static_cast<double>(agreed) / rows;
  out.rel_logit_error =
      source_squared > 0 ? std::sqrt(diff_squared / source_squared) : std::sqrt(diff_squared);
  if (out.non_finite > 0) {
    out.source_nll = out.converted_nll = out.mean_kl = out.max_kl = out.max_abs_logit_diff =
        out.rel_logit_error = std::numeric_limits<double>::quiet_NaN();
  }
  return out;
}

}  // namespace

MatrixF logits_of(const Model& model, const Stream& stream, Index sequence) {
  const MatrixF states = normed(model.final_norm(), stream.sequence(sequence));
  const Index vocab = model.config().vocab_size;
  MatrixF out(stream.length(), vocab);
  for (Index first = 0; first < vocab; first += vocab_slice) {
    const Index width = std::min(vocab_slice, vocab - first);
    out.middleCols(first, width).noalias() = states * model.head_rows(first, width).transpose();
  }
  cap_logits(model, out);
  return out;
}

LogitComparison compare_logits(const Model& source, const Stream& source_stream, const Model& converted,
                               const Stream& converted_stream, const Sequences& sequences) {
  const Stage stage("logits");
  const MatrixF source_states = final_states(source, source_stream);
  const MatrixF converted_states = final_states(converted, converted_stream);
  const Index rows = source_states.rows();
  const Index length = sequences.length;
  const Index vocab = source.config().vocab_size;
  const Index blocks = (rows + row_block - 1) / row_block;
  std::vector<Position> positions(static_cast<std::size_t>(rows));
  std::vector<Totals> totals(static_cast<std::size_t>(blocks));
  for (Index first = 0; first < vocab; first += vocab_slice) {
    const Index width = std::min(vocab_slice, vocab - first);
    const MatrixF source_head = source.head_rows(first, width);
    const MatrixF converted_head = converted.head_rows(first, width);
    parallel_for(static_cast<std::size_t>(blocks), [&](std::size_t b) {
      const Index row = static_cast<Index>(b) * row_block;
      const Index count = std::min(row_block, rows - row);
      MatrixF ls(count, width);
      MatrixF lc(count, width);
      ls.noalias() = source_states.middleRows(row, count) * source_head.transpose();
      lc.noalias() = converted_states.middleRows(row, count) * converted_head.transpose();
      cap_logits(source, ls);
      cap_logits(converted, lc);
      for (Index i = 0; i < count; ++i) {
        const auto at = static_cast<std::size_t>(row + i);
        compare_slice(ls.row(i), lc.row(i), first, positions[at], totals[b]);
        if ((row + i) % length + 1 < length) {
          const Index target = sequences.tokens[at + 1] - first;
          if (target >= 0 && target < width) {
            positions[at].source_target = ls(i, target);
            positions[at].converted_target = lc(i, target);
          }
        }
      }
    });
  }
  return means_of(positions, totals, length);
}

}  // namespace relatent
