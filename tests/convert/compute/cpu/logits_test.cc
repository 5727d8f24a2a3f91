#include "convert/compute/cpu/logits.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "convert/compute/backend.h"
#include "tests/support/reference.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_count.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::apply;
using testing_support::kFloatNoise;
using testing_support::position_of;
using testing_support::Random;
using testing_support::random_sequences;
using testing_support::relative_error;
using testing_support::TempFolder;
using testing_support::ThreadCount;
using testing_support::tiny_model;
using testing_support::TinyModel;

Model open(const TinyModel& tiny, const TempFolder& folder, const std::string& name = "model") {
  tiny.write(folder / name);
  return Model::open(folder / name);
}

void run(const Model& model, Stream& stream) {
  for (Index i = 0; i < model.config().num_hidden_layers; ++i) {
    run_layer(model.layer(i), stream);
  }
}

// Everything that compare_logits reports, from whole rows of logits in double precision.
LogitComparison compare_by_the_book(const Model& source, const Stream& source_stream, const Model& converted,
                                    const Stream& converted_stream, const Sequences& sequences) {
  LogitComparison out;
  double diff_squared = 0;
  double source_squared = 0;
  Index rows = 0;
  for (Index s = 0; s < sequences.count; ++s) {
    const MatrixF a = logits_of(source, source_stream, s);
    const MatrixF b = logits_of(converted, converted_stream, s);
    for (Index n = 0; n < sequences.length; ++n, ++rows) {
      const VectorD la = a.row(n).transpose().cast<double>();
      const VectorD lb = b.row(n).transpose().cast<double>();
      const VectorD pa = testing_support::softmax(la);
      const VectorD pb = testing_support::softmax(lb);
      double kl = 0;
      for (Index t = 0; t < pa.size(); ++t) {
        kl += pa(t) * std::log(pa(t) / pb(t));
      }
      out.mean_kl += kl;
      out.max_kl = std::max(out.max_kl, kl);
      Index top_a = 0;
      Index top_b = 0;
      pa.maxCoeff(&top_a);
      pb.maxCoeff(&top_b);
      out.top1_agreement += top_a == top_b ? 1 : 0;
      out.max_abs_logit_diff = std::max(out.max_abs_logit_diff, (la - lb).cwiseAbs().maxCoeff());
      diff_squared += (la - lb).squaredNorm();
      source_squared += la.squaredNorm();
      if (n + 1 < sequences.length) {
        const std::int32_t target = sequences.tokens[static_cast<std::size_t>(s * sequences.length + n + 1)];
        out.source_nll -= std::log(pa(target));
        out.converted_nll -= std::log(pb(target));
        ++out.tokens;
      }
    }
  }
  out.source_nll /= static_cast<double>(out.tokens);
  out.converted_nll /= static_cast<double>(out.tokens);
  out.mean_kl /= static_cast<double>(rows);
  out.top1_agreement /= static_cast<double>(rows);
  out.rel_logit_error = std::sqrt(diff_squared / source_squared);
  return out;
}

void expect_same(const LogitComparison& found, const LogitComparison& expected) {
  EXPECT_EQ(found.tokens, expected.tokens);
  // Logits of size one, summed in float32 over slices of the vocabulary.
  EXPECT_NEAR(found.source_nll, expected.source_nll, kFloatNoise);
  EXPECT_NEAR(found.converted_nll, expected.converted_nll, kFloatNoise);
  EXPECT_NEAR(found.mean_kl, expected.mean_kl, kFloatNoise);
  EXPECT_NEAR(found.max_kl, expected.max_kl, kFloatNoise);
  EXPECT_EQ(found.top1_agreement, expected.top1_agreement);
  EXPECT_NEAR(found.max_abs_logit_diff, expected.max_abs_logit_diff, kFloatNoise);
  EXPECT_NEAR(found.rel_logit_error, expected.rel_logit_error, kFloatNoise);
}

TEST(Logits, ComparisonIsThatOfWholeSoftmaxes) {
  // 5000 and 8192 + 1 tokens take more than one slice of the vocabulary, 150 rows more than one block.
  for (const Index vocab : {50, 5000, 8193}) {
    SCOPED_TRACE(vocab);
    const TempFolder folder;
    TinyModel tiny = tiny_model({.layers = 1, .vocab = vocab});
    const Model source = open(tiny, folder);
    Random random(4);
    for (auto& [name, tensor] : tiny.tensors) {
      for (float& value : tensor.values) {
        value += static_cast<float>(0.05 * random.number());
      }
    }
    const Model converted = open(tiny, folder, "converted");
    const Sequences sequences = random_sequences(5, 3, 50, vocab);
    Stream source_stream(source, sequences);
    Stream converted_stream(converted, sequences);
    run(source, source_stream);
    run(converted, converted_stream);
    const LogitComparison expected =
        compare_by_the_book(source, source_stream, converted, converted_stream, sequences);
    EXPECT_EQ(expected.tokens, 3 * 49);
    EXPECT_GT(expected.mean_kl, 1e-3);
    EXPECT_LT(expected.top1_agreement, 1);
    const LogitComparison found =
        compare_logits(source, source_stream, converted, converted_stream, sequences);
    expect_same(found, expected);
    const ThreadCount one(1);
    const LogitComparison again =
        compare_logits(source, source_stream, converted, converted_stream, sequences);
    EXPECT_EQ(again.source_nll, found.source_nll);
    EXPECT_EQ(again.mean_kl, found.mean_kl);
    EXPECT_EQ(again.rel_logit_error, found.rel_logit_error);
  }
}

TEST(Logits, LogitsAreProductsWithTheHead) {
  const TempFolder folder;
  const TinyModel tiny = tiny_model({.layers = 1, .vocab = 5000, .tied = true});
  const Model model = open(tiny, folder);
  const Stream stream(model, random_sequences(6, 2, 3, 5000));
  const MatrixF found = logits_of(model, stream, 1);
  const MatrixD head = model.head_rows(0, 5000).cast<double>();
  MatrixD expected(3, 5000);
  const MatrixF hidden = stream.sequence(1);
  for (Index n = 0; n < 3; ++n) {
    expected.row(n) = (head * apply(model.final_norm(), position_of(hidden, n))).transpose();
  }
  EXPECT_LE(relative_error(found, expected), kFloatNoise);
}

TEST(Logits, SharpLogitsKeepTheirPrecision) {
  const TempFolder folder;
  TinyModel tiny = tiny_model({.layers = 1, .vocab = 5000});
  // Peaks of about a hundred, most of them in the last slice.
  auto& head = tiny.tensors.at("lm_head.weight").values;
  for (std::size_t i = 0; i < head.size(); ++i) {
    head[i] *= i / 24 > 4500 ? 40.0F : 20.0F;
  }
  const Model source = open(tiny, folder);
  for (float& value : head) {
    value *= 1.01F;
  }
  const Model converted = open(tiny, folder, "converted");
  const Sequences sequences = random_sequences(7, 2, 30, 5000);
  const Stream stream(source, sequences);
  const LogitComparison found = compare_logits(source, stream, converted, stream, sequences);
  const LogitComparison expected = compare_by_the_book(source, stream, converted, stream, sequences);
  EXPECT_GT(expected.max_abs_logit_diff, 1);
  // A hundred times larger logits, a hundred times larger roundings.
  EXPECT_NEAR(found.source_nll, expected.source_nll, 100 * kFloatNoise);
  EXPECT_NEAR(found.converted_nll, expected.converted_nll, 100 * kFloatNoise);
  EXPECT_NEAR(found.max_kl, expected.max_kl, 100 * kFloatNoise);
  EXPECT_NEAR(found.rel_logit_error, 0.01, kFloatNoise);
  EXPECT_EQ(found.top1_agreement, 1);
}

TEST(Logits, AgainstItselfNothingDiffers) {
  const TempFolder folder;
  const Model model = open(tiny_model({.layers = 1, .vocab = 4200}), folder);
  const Sequences sequences = random_sequences(8, 2, 10, 4200);
  Stream stream(model, sequences);
  run(model, stream);
  const LogitComparison found = compare_logits(model, stream, model, stream, sequences);
  EXPECT_EQ(found.source_nll, found.converted_nll);
  EXPECT_EQ(found.mean_kl, 0);
  EXPECT_EQ(found.max_kl, 0);
  EXPECT_EQ(found.top1_agreement, 1);
  EXPECT_EQ(found.max_abs_logit_diff, 0);
  EXPECT_EQ(found.rel_logit_error, 0);
}

TEST(Logits, OneWrongLogitIsNoticed) {
  const TempFolder folder;
  TinyModel tiny = tiny_model({.layers = 1, .vocab = 5000});
  const Model source = open(tiny, folder);
  // The last token of the vocabulary, along one coordinate.
  tiny.tensors.at("lm_head.weight").values[4999 * 24 + 7] += 0.5F;
  const Model converted = open(tiny, folder, "converted");
  const Sequences sequences = random_sequences(9, 2, 10, 4000);
  const Stream stream(source, sequences);
  double largest = 0;
  for (Index s = 0; s < 2; ++s) {
    const MatrixF states = normed(source.final_norm(), stream.sequence(s));
    largest = std::max(largest, 0.5 * static_cast<double>(states.col(7).cwiseAbs().maxCoeff()));
  }
  const LogitComparison found = compare_logits(source, stream, converted, stream, sequences);
  EXPECT_NEAR(found.max_abs_logit_diff, largest, kFloatNoise);
  EXPECT_GT(found.rel_logit_error, 0);
  EXPECT_GT(found.max_kl, 0);
}

// The targets of a sequence are its own tokens but the first.
TEST(Logits, LastPositionsPredictNothing) {
  const TempFolder folder;
  const Model model = open(tiny_model({.layers = 1}), folder);
  const Sequences sequences = random_sequences(10, 3, 5, 50);
  const Stream stream(model, sequences);
  const auto nll = [&](const Sequences& targets) {
    const LogitComparison found = compare_logits(model, stream, model, stream, targets);
    EXPECT_EQ(found.tokens, 12);
    return found.source_nll;
  };
  const double original = nll(sequences);
  for (std::size_t i = 0; i < 15; ++i) {
    Sequences changed = sequences;
    changed.tokens[i] = (changed.tokens[i] + 1) % 50;
    if (i % 5 == 0) {
      EXPECT_EQ(nll(changed), original) << i;
    } else {
      EXPECT_NE(nll(changed), original) << i;
    }
  }
}

}  // namespace
}  // namespace relatent
