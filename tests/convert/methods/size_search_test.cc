#include "convert/methods/size_search.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "convert/latent/maps.h"
#include "examples_path.h"
#include "formats/npy.h"
#include "tests/support/expect_error.h"

namespace relatent {
namespace {

using testing_support::expect_error;

// The trained example: K d = 128, d = 32, so a cache of 256 numbers.
class SizeSearchTest : public testing::Test {
 protected:
  static Sequences tokens(Index count) {
    return read_sequences(RELATENT_EXAMPLES "/tokens/calibration.npy", 64, count, 4096);
  }
  static RelatentOptions quick() {
    RelatentOptions out;
    out.fit.queries = false;
    out.fit.keys = false;
    return out;
  }
  SizeSearch search(const RelatentOptions& options, const Sequences& sequences) {
    return {model_,
            [this](Index i) {
              return moments_without_data(model_.input_norm(i), model_.config().num_attention_heads, 64);
            },
            sequences, options, [this](const SizeTrial& trial) { heard_.push_back(trial); }};
  }
  void expect_heard(const SizeSearch& done) const {
    ASSERT_EQ(heard_.size(), done.trials().size());
    for (std::size_t i = 0; i < heard_.size(); ++i) {
      EXPECT_EQ(heard_[i].rope_dim, done.trials()[i].rope_dim);
      EXPECT_EQ(heard_[i].nats, done.trials()[i].nats);
    }
  }

  const Model model_ = Model::open(RELATENT_EXAMPLES "/llama-3m");
  std::vector<SizeTrial> heard_;
};

TEST_F(SizeSearchTest, KnownTrialsAreNotRepeated) {
  SizeSearch first = search(quick(), tokens(6));
  const SizeTrial chosen = first.rotary_for(128);
  heard_.clear();
  SizeSearch second = search(quick(), tokens(6));
  second.take_over({first.trials()[0], first.trials()[2]});
  EXPECT_EQ(second.rotary_for(128).rope_dim, chosen.rope_dim);
  ASSERT_EQ(heard_.size(), 1U);
  EXPECT_EQ(heard_[0].nats, first.trials()[1].nats);
  ASSERT_EQ(second.trials().size(), 3U);
  EXPECT_EQ(second.trials()[2].nats, first.trials()[2].nats);
}

TEST_F(SizeSearchTest, RotaryIsTheBestOfThoseTried) {
  SizeSearch running = search(quick(), tokens(6));
  const SizeTrial chosen = running.rotary_for(128);
  EXPECT_EQ(chosen.rope_dim + chosen.rank, 128);
  ASSERT_EQ(running.trials().size(), 3);
  expect_heard(running);
  for (const SizeTrial& trial : running.trials()) {
    EXPECT_EQ(trial.rope_dim + trial.rank, 128);
    EXPECT_EQ(trial.rope_dim % 16, 0);
    EXPECT_GE(trial.nats, chosen.nats);
  }
}

TEST_F(SizeSearchTest, PlainListsStayWithinTheHead) {
  RelatentOptions options = quick();
  options.plain_list = true;
  SizeSearch running = search(options, tokens(6));
  EXPECT_LE(running.rotary_for(192).rope_dim, 32);
  for (const SizeTrial& trial : running.trials()) {
    EXPECT_LE(trial.rope_dim, 32);
  }
}

TEST_F(SizeSearchTest, OneCandidateIsTakenUntried) {
  SizeSearch running = search(quick(), tokens(6));
  const SizeTrial chosen = running.rotary_for(32);
  EXPECT_EQ(chosen.rope_dim, 16);
  EXPECT_EQ(chosen.rank, 16);
  EXPECT_TRUE(std::isnan(chosen.nats));
  EXPECT_TRUE(running.trials().empty());
}

TEST_F(SizeSearchTest, SmallestWithinIsBracketedByTrials) {
  SizeSearch running = search(quick(), tokens(8));
  const SizeTrial chosen = running.smallest_within(0.5);
  EXPECT_LE(chosen.nats, 0.5);
  expect_heard(running);
  const Index total = chosen.rope_dim + chosen.rank;
  EXPECT_LT(total, 256);
  EXPECT_EQ(total % 16, 0);
  bool smaller_fails = false;
  for (const SizeTrial& trial : running.trials()) {
    const Index size = trial.rope_dim + trial.rank;
    EXPECT_EQ(trial.nats <= 0.5, size >= total) << size;
    smaller_fails = smaller_fails || size == total - 16;
  }
  EXPECT_TRUE(smaller_fails);
}

TEST_F(SizeSearchTest, AllOfTheCacheWhenNothingLessDoes) {
  SizeSearch running = search(quick(), tokens(4));
  const SizeTrial chosen = running.smallest_within(1e-12);
  EXPECT_EQ(chosen.rope_dim + chosen.rank, 256);
}

TEST_F(SizeSearchTest, OneSequenceIsNotEnough) {
  expect_error(ErrorKind::usage, {"--rope-dim", "--rank", "only one"}, [&] { search(quick(), tokens(1)); });
}

}  // namespace
}  // namespace relatent
