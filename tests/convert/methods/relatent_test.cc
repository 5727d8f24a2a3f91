#include "convert/methods/relatent.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "convert/compute/backend.h"
#include "convert/compute/cpu/attention.h"
#include "convert/compute/cpu/logits.h"
#include "convert/compute/cpu/products.h"
#include "examples_path.h"
#include "tests/support/samples.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::kFloatNoise;
using testing_support::ThreadCount;

RelatentOptions sizes(Index rank, Index rope_dim) {
  RelatentOptions out;
  out.rank = rank;
  out.rope_dim = rope_dim;
  return out;
}

// The trained example, tokens to fit on and others, and the moments of its inputs. K d = 128, d = 32.
class Relatent : public testing::Test {
 protected:
  static Sequences tokens(const std::string& name, Index count) {
    return read_sequences(std::string(RELATENT_EXAMPLES "/tokens/") + name + ".npy", 64, count, 4096);
  }

  Relatent() {
    Stream stream(model_, fitted_);
    for (Index i = 0; i < model_.config().num_hidden_layers; ++i) {
      const Layer layer = model_.layer(i);
      const auto& attention = std::get<GqaAttention>(layer.attention);
      const MatrixF x = normed(layer.input_norm, stream.hidden());
      const MatrixD columns = testing_support::with_ones(x);
      Moments moments;
      moments.second = columns * columns.transpose() / static_cast<double>(x.rows());
      const std::vector<MatrixF> roots = output_roots(layer.attention);
      AttentionSums sums(attention.heads, stream.length(), &roots);
      const RotaryTable table(attention.rotary, stream.length());
      for (Index s = 0; s < stream.count(); ++s) {
        attention_forward(attention, x.middleRows(s * stream.length(), stream.length()), table, &sums);
      }
      const auto tokens = static_cast<double>(x.rows());
      moments.distance_mass =
          sums.distance_mass.array().colwise() / sums.distance_mass.rowwise().sum().array();
      moments.effects = {sums.mass_square / tokens, sums.score_effect / tokens};
      moments_.push_back(std::move(moments));
      run_layer(layer, stream);
    }
  }

  RelatentConversion conversion(const RelatentOptions& options, const Sequences& sequences) const {
    return {model_, [this](Index i) { return moments_[static_cast<std::size_t>(i)]; }, sequences, options};
  }
  std::vector<LatentAttention> converted(const RelatentOptions& options, const Sequences& sequences) const {
    RelatentConversion running = conversion(options, sequences);
    std::vector<LatentAttention> out;
    for (Index i = 0; i < 4; ++i) {
      out.push_back(running.next().value());
    }
    return out;
  }
  LogitComparison compared(const std::vector<LatentAttention>& layers, const Sequences& sequences) const {
    Stream source(model_, sequences);
    Stream other(model_, sequences);
    for (Index i = 0; i < 4; ++i) {
      Layer layer = model_.layer(i);
      run_layer(layer, source);
      layer.attention = layers[static_cast<std::size_t>(i)];
      run_layer(layer, other);
    }
    return compare_logits(model_, source, model_, other, sequences);
  }

  const Model model_ = Model::open(RELATENT_EXAMPLES "/llama-3m");
  const Sequences fitted_ = tokens("calibration", 10);
  const Sequences few_ = first_sequences(fitted_, 2);
  const Sequences others_ = tokens("validation", 5);
  const Sequences none_;
  std::vector<Moments> moments_;
};

TEST_F(Relatent, WithEverythingKeptLosesNothing) {
  const RelatentOptions all = sizes(256, 128);
  EXPECT_LE(compared(converted(all, none_), others_).rel_logit_error, kFloatNoise);
  // With nothing known of the inputs, too.
  RelatentConversion blind(
      model_, [&](Index i) { return moments_without_data(model_.input_norm(i), 8, 64); }, none_, all);
  std::vector<LatentAttention> layers;
  for (Index i = 0; i < 4; ++i) {
    layers.push_back(blind.next().value());
  }
  EXPECT_LE(compared(layers, others_).rel_logit_error, kFloatNoise);
}

TEST_F(Relatent, GoesOnWhereAnotherStopped) {
  const testing_support::TempFolder folder;
  for (const Sequences& sequences : {none_, few_}) {
    const std::vector<LatentAttention> whole = converted(sizes(96, 32), sequences);
    RelatentConversion first = conversion(sizes(96, 32), sequences);
    EXPECT_EQ(first.independent(), sequences.count == 0);
    first.next();
    first.next();
    first.save(folder / "streams");
    RelatentConversion second = conversion(sizes(96, 32), sequences);
    EXPECT_EQ(second.resume(folder / "nothing", 2), sequences.count > 0 ? 0 : 2);
    EXPECT_EQ(second.resume(folder / "streams", 2), 2);
    for (std::size_t i = 2; i < 4; ++i) {
      const LatentAttention layer = second.next().value();
      EXPECT_TRUE(layer.q.weight == whole[i].q.weight);
      EXPECT_TRUE(layer.o.weight == whole[i].o.weight);
      EXPECT_TRUE(layer.branches[0].down.weight == whole[i].branches[0].down.weight);
      EXPECT_EQ(layer.rotary.inv_freq, whole[0].rotary.inv_freq);
    }
  }
}

TEST_F(Relatent, EveryLayerMayHaveAListOfItsOwn) {
  RelatentOptions options = sizes(48, 16);
  EXPECT_EQ(conversion(options, none_).rotaries().size(), 1U);
  options.layer_lists = true;
  const std::vector<Rotary> rotaries = conversion(options, none_).rotaries();
  ASSERT_EQ(rotaries.size(), 4U);
  const std::vector<LatentAttention> layers = converted(options, none_);
  std::set<std::vector<float>> lists;
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(rotaries[i].inv_freq.size(), 8U);
    EXPECT_EQ(layers[i].rotary.inv_freq, rotaries[i].inv_freq);
    lists.insert(rotaries[i].inv_freq);
  }
  EXPECT_GT(lists.size(), 1U);
  // With everything kept, they lose as little as one list does.
  options = sizes(256, 128);
  options.layer_lists = true;
  EXPECT_LE(compared(converted(options, none_), others_).rel_logit_error, kFloatNoise);
}

// The values alone need no more than half of the latent. The fits find nothing to do, on any tokens.
TEST_F(Relatent, FitsLeaveALosslessLayerAlone) {
  const std::vector<LatentAttention> layers = converted(sizes(128, 128), few_);
  EXPECT_LE(compared(layers, few_).rel_logit_error, kFloatNoise);
  EXPECT_LE(compared(layers, others_).rel_logit_error, kFloatNoise);
}

TEST_F(Relatent, LayersHaveTheSizesAskedFor) {
  const RelatentOptions options = sizes(40, 24);
  for (const Sequences& sequences : {none_, few_}) {
    const std::vector<LatentAttention> layers = converted(options, sequences);
    for (const LatentAttention& layer : layers) {
      EXPECT_EQ(layer.heads, 8);
      EXPECT_EQ(layer.rope_dim, 24);
      EXPECT_EQ(layer.nope_dim, 32);
      EXPECT_EQ(layer.v_dim, 32);
      EXPECT_EQ(layer.total_rank(), 40);
      ASSERT_EQ(layer.branches.size(), 1U);
      EXPECT_EQ(layer.branches[0].up.rows(), 8 * 64);
      EXPECT_EQ(layer.q.out(), 8 * 56);
      EXPECT_EQ(layer.rotary_key.out(), 24);
      // One list of frequencies for all layers.
      EXPECT_EQ(layer.rotary.inv_freq.size(), 12U);
      EXPECT_EQ(layer.rotary.inv_freq, layers[0].rotary.inv_freq);
      EXPECT_EQ(layer.o.bias.size(), 192);
    }
  }
}

TEST_F(Relatent, FitsBringTheLogitsNearer) {
  RelatentOptions options = sizes(48, 16);
  const LogitComparison closed = compared(converted(options, none_), fitted_);
  EXPECT_GT(closed.rel_logit_error, 0.05);
  options.fit = {.keys = false, .refit = false};
  const LogitComparison queries = compared(converted(options, fitted_), fitted_);
  EXPECT_LT(queries.rel_logit_error, closed.rel_logit_error);
  options.fit = {.queries = false, .keys = false};
  const LogitComparison output = compared(converted(options, fitted_), fitted_);
  EXPECT_LT(output.rel_logit_error, closed.rel_logit_error);
  options.fit = {};
  const std::vector<LatentAttention> layers = converted(options, fitted_);
  const LogitComparison all = compared(layers, fitted_);
  EXPECT_LT(all.rel_logit_error, queries.rel_logit_error);
  EXPECT_LT(all.rel_logit_error, output.rel_logit_error);
  EXPECT_LT(all.mean_kl, closed.mean_kl);
  EXPECT_LT(compared(layers, others_).mean_kl, compared(converted(options, none_), others_).mean_kl);
}

// What first order says of score errors may be wrong by a factor, which the output on the tokens undoes.
TEST_F(Relatent, TheOutputChoosesTheWeightOfKeys) {
  const double before = compared(converted(sizes(96, 32), fitted_), others_).mean_kl;
  for (Moments& moments : moments_) {
    moments.effects.score_effect /= 16;
  }
  const double after = compared(converted(sizes(96, 32), fitted_), others_).mean_kl;
  EXPECT_NEAR(after / before, 1, 1e-3);
  // Closed forms alone have nobody to tell them.
  EXPECT_GT(compared(converted(sizes(96, 32), none_), others_).mean_kl, 1.2 * before);
}

TEST_F(Relatent, ScoreErrorIsThatOfTheLastLayer) {
  RelatentConversion running = conversion(sizes(48, 16), few_);
  double before = 0;
  for (Index i = 0; i < 4; ++i) {
    running.next();
    EXPECT_GT(running.score_error().before, 0);
    EXPECT_GT(running.score_error().after, 0);
    EXPECT_LT(running.score_error().after, running.score_error().before);
    EXPECT_NE(running.score_error().before, before);
    before = running.score_error().before;
  }
  RelatentOptions options = sizes(48, 16);
  options.fit.queries = false;
  RelatentConversion without = conversion(options, few_);
  without.next();
  EXPECT_EQ(without.score_error().before, 0);
  EXPECT_EQ(without.score_error().after, 0);
}

TEST_F(Relatent, NothingToFitNeedsNoTokens) {
  RelatentOptions options = sizes(48, 16);
  options.fit = {.queries = false, .keys = false, .refit = false};
  EXPECT_FALSE(options.uses_tokens());
  EXPECT_TRUE(RelatentOptions{}.uses_tokens());
  const std::vector<LatentAttention> with = converted(options, fitted_);
  const std::vector<LatentAttention> without = converted(sizes(48, 16), none_);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_TRUE(with[i].q.weight == without[i].q.weight);
    EXPECT_TRUE(with[i].branches[0].down.weight == without[i].branches[0].down.weight);
    EXPECT_TRUE(with[i].branches[0].up == without[i].branches[0].up);
    EXPECT_TRUE(with[i].o.weight == without[i].o.weight);
  }
}

TEST_F(Relatent, EndsWithTheLastLayer) {
  for (const Sequences& sequences : {none_, few_}) {
    RelatentConversion running = conversion(sizes(8, 4), sequences);
    for (Index i = 0; i < 4; ++i) {
      running.next();
    }
    EXPECT_THROW(running.next(), std::logic_error);
    EXPECT_THROW(running.next(), std::logic_error);
  }
}

TEST_F(Relatent, PlainListIsGeometric) {
  const std::vector<float> all = rotary_of(model_.attention(0)).inv_freq;
  Index widest = 1;
  // This model's best lists have every frequency from the fastest; a wider one must be asked for.
  for (const auto& [pairs, asked] : std::vector<std::pair<Index, std::optional<Index>>>{
           {2, std::nullopt}, {4, std::nullopt}, {6, std::nullopt}, {2, 5}, {4, 2}}) {
    RelatentOptions options = sizes(48, 2 * pairs);
    options.plain_list = true;
    options.list_stride = asked;
    RelatentConversion running = conversion(options, none_);
    const Index stride = running.list_stride();
    EXPECT_EQ(stride, asked.value_or(stride));
    std::vector<float> expected;
    for (Index i = 0; i < pairs; ++i) {
      expected.push_back(all.at(static_cast<std::size_t>(i * stride)));
    }
    EXPECT_EQ(running.next()->rotary.inv_freq, expected);
    widest = std::max(widest, stride);
  }
  EXPECT_GT(widest, 1);
  EXPECT_EQ(conversion(sizes(48, 8), none_).list_stride(), 1);
  RelatentOptions options = sizes(48, 34);
  options.plain_list = true;
  EXPECT_THROW(conversion(options, none_), std::invalid_argument);
}

TEST_F(Relatent, EveryOptionOfTheClosedFormsCounts) {
  const RelatentOptions plain = sizes(48, 16);
  const double error = compared(converted(plain, none_), fitted_).rel_logit_error;
  RelatentOptions options = plain;
  options.expected_rotation = false;
  EXPECT_GT(compared(converted(options, none_), fitted_).rel_logit_error, error);
  options = plain;
  options.output_metric = false;
  EXPECT_GT(std::abs(compared(converted(options, none_), fitted_).rel_logit_error / error - 1), 0.01);
  options = plain;
  options.plain_list = true;
  EXPECT_NE(conversion(options, none_).next()->rotary.inv_freq,
            conversion(plain, none_).next()->rotary.inv_freq);
}

TEST_F(Relatent, IsTheSameForAnyThreadCount) {
  const auto run = [&](int threads) {
    const ThreadCount scope(threads);
    return converted(sizes(24, 8), few_);
  };
  const std::vector<LatentAttention> one = run(1);
  const std::vector<LatentAttention> two = run(2);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_TRUE(one[i].q.weight == two[i].q.weight);
    EXPECT_TRUE(one[i].q.bias == two[i].q.bias);
    EXPECT_TRUE(one[i].rotary_key.weight == two[i].rotary_key.weight);
    EXPECT_TRUE(one[i].branches[0].down.weight == two[i].branches[0].down.weight);
    EXPECT_TRUE(one[i].branches[0].up == two[i].branches[0].up);
    EXPECT_TRUE(one[i].o.weight == two[i].o.weight);
    EXPECT_TRUE(one[i].o.bias == two[i].o.bias);
  }
}

}  // namespace
}  // namespace relatent
