// Plans without trials.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>

#include "convert/run/convert.h"
#include "tests/support/conversion.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::calibrated_closed_forms;
using testing_support::Conversion;
using testing_support::expect_error;
using testing_support::TempFolder;
using testing_support::tiny_model;
using testing_support::TinyModel;

// Two key/value heads of 32: a cache of 128 numbers in each of three layers.
class DryRun : public testing::Test {
 protected:
  DryRun() {
    write_source();
    options_ = calibrated_closed_forms(folder_);
  }

  static TinyModel model() { return tiny_model({.heads = 4, .kv_heads = 2, .head_dim = 32}); }
  void write_source() const { model().write(folder_ / "source"); }
  // Whoever reads a weight stumbles.
  void spoil_weights() const {
    TinyModel spoilt = model();
    for (auto& [name, tensor] : spoilt.tensors) {
      std::fill(tensor.values.begin(), tensor.values.end(), std::numeric_limits<float>::quiet_NaN());
    }
    fs::remove_all(folder_ / "source");
    spoilt.write(folder_ / "source");
  }
  ConvertPlan dry() const {
    const ConvertInputs inputs = open_inputs(options_);
    return plan_without_trials(options_, inputs);
  }
  // Tries nothing, and plans a size that the trials may choose.
  ConvertPlan expect_open() const {
    ConvertPlan plan = dry();
    EXPECT_TRUE(plan.trials.empty());
    EXPECT_TRUE(plan.open);
    const Index keys = plan.shape.shared_ranks.empty() ? 0 : plan.shape.shared_ranks.front();
    EXPECT_TRUE(among(*plan.open, {plan.shape.qk_rope_head_dim, plan.shape.kv_lora_rank, keys}));
    EXPECT_FALSE(fs::exists(options_.output));
    EXPECT_FALSE(fs::exists(options_.output.string() + ".partial"));
    return plan;
  }
  static bool among(const OpenSizes& open, const CacheSizes& sizes) {
    return std::any_of(open.candidates.begin(), open.candidates.end(), [&](const CacheSizes& one) {
      return one.rope_dim == sizes.rope_dim && one.rank == sizes.rank && one.key_rank == sizes.key_rank;
    });
  }
  // What is really tried and chosen is among what was said.
  void expect_said(const OpenSizes& open) const {
    const Conversion real(options_);
    EXPECT_FALSE(real.plan().open);
    ASSERT_FALSE(real.plan().trials.empty());
    std::size_t unsaid = 0;
    for (const SizeTrial& trial : real.plan().trials) {
      unsaid += among(open, {trial.rope_dim, trial.rank, trial.key_rank}) ? 0 : 1;
    }
    EXPECT_LE(unsaid, open.weights_add_one ? 1 : 0);
    if (open.all_tried) {
      EXPECT_EQ(real.plan().trials.size(), open.candidates.size() + unsaid);
    }
  }

  TempFolder folder_;
  ConvertOptions options_;
};

TEST_F(DryRun, ABudgetSaysWhatWillBeTried) {
  options_.kv_budget = 0.5;
  const ConvertPlan plan = expect_open();
  EXPECT_TRUE(plan.open->all_tried);
  ASSERT_EQ(plan.open->candidates.size(), 2U);
  EXPECT_EQ(plan.shape.qk_rope_head_dim, 32);
  // The layout's constant coordinate is within the budget.
  EXPECT_EQ(plan.shape.qk_rope_head_dim + plan.shape.kv_lora_rank, 63);
  EXPECT_EQ(plan.converted_cache_elements, 64);
  EXPECT_EQ(plan.source_cache_bytes, 128U * 3 * 4);
  EXPECT_EQ(plan.converted_cache_bytes, 64U * 3 * 4);
  EXPECT_GT(plan.memory_bytes, 0U);
  EXPECT_FALSE(plan.tensors.empty());
  expect_said(*plan.open);
}

TEST_F(DryRun, APlainListHasASizeOfItsOwn) {
  options_.kv_budget = 0.5;
  EXPECT_FALSE(expect_open().open->weights_add_one);
  options_.engine = "deepseek";
  const ConvertPlan plan = expect_open();
  EXPECT_TRUE(plan.open->weights_add_one);
  expect_said(*plan.open);
}

TEST_F(DryRun, ReadsNoWeight) {
  spoil_weights();
  options_.kv_budget = 0.5;
  EXPECT_NO_THROW(expect_open());
  // The trials do, to begin with to see whether the calibration is of this source.
  EXPECT_THROW(Conversion{options_}, Error);
}

TEST_F(DryRun, ALimitOfTheLossSaysBetweenWhichCaches) {
  options_.max_nats = 0.5;
  const ConvertPlan plan = expect_open();
  EXPECT_FALSE(plan.open->all_tried);
  EXPECT_EQ(plan.open->step, 16);
  // The first that is tried.
  EXPECT_EQ(plan.shape.qk_rope_head_dim + plan.shape.kv_lora_rank, 64);
  expect_said(*plan.open);
  EXPECT_EQ(Conversion(options_).plan().trials.front().rank, plan.shape.kv_lora_rank);
}

TEST_F(DryRun, NumbersPerDeviceSayBetweenWhichSizes) {
  options_.form = "tpla";
  options_.branches = 2;
  options_.per_device = 40;
  for (const bool rotary_given : {false, true}) {
    options_.rope_dim = rotary_given ? std::optional<Index>(16) : std::nullopt;
    const ConvertPlan plan = expect_open();
    EXPECT_FALSE(plan.open->all_tried);
    EXPECT_EQ(plan.open->step, 8);
    EXPECT_EQ(plan.shape.qk_rope_head_dim, 16);
    expect_said(*plan.open);
    const SizeTrial first = Conversion(options_).plan().trials.front();
    EXPECT_EQ(first.rank, plan.shape.kv_lora_rank);
    EXPECT_EQ(first.key_rank, plan.shape.shared_ranks.front());
  }
}

TEST_F(DryRun, SettledSizesArePlannedAsTheyAre) {
  options_.kv_budget = 0.5;
  options_.rope_dim = 16;
  EXPECT_FALSE(dry().open);
  EXPECT_EQ(dry().shape.kv_lora_rank, 47);
  // One candidate is taken untried.
  options_.rope_dim.reset();
  options_.kv_budget = 0.25;
  EXPECT_FALSE(dry().open);
  EXPECT_EQ(dry().shape.qk_rope_head_dim + dry().shape.kv_lora_rank, 31);
  options_.method = Method::lossless;
  options_.kv_budget.reset();
  EXPECT_FALSE(dry().open);
}

TEST_F(DryRun, RefusesWhatTheConversionWould) {
  options_.kv_budget = 0.2;
  expect_error(ErrorKind::usage, {"--kv-budget leaves less than 32"}, [&] { dry(); });
  options_.kv_budget.reset();
  options_.max_nats = 0.5;
  options_.rank = 4;
  expect_error(ErrorKind::usage, {"--max-nats chooses the sizes"}, [&] { dry(); });
  options_.rank.reset();
  options_.held_out = 11;
  expect_error(ErrorKind::usage, {"there is only one"}, [&] { dry(); });
}

}  // namespace
}  // namespace relatent
