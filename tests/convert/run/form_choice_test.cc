// --to auto.
#include "convert/run/form_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "convert/run/convert.h"
#include "tests/support/conversion.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::calibrated_closed_forms;
using testing_support::expect_error;
using testing_support::TempFolder;
using testing_support::tiny_model;

// Four heads, two key/value heads of 32: 64 numbers of keys and values for the heads of each.
class FormChoiceTest : public testing::Test {
 protected:
  FormChoiceTest() {
    tiny_model({.heads = 4, .kv_heads = 2, .head_dim = 32}).write(folder_ / "source");
    options_ = calibrated_closed_forms(folder_);
    options_.form = any_form_name;
    options_.engine = "relatent";
    options_.devices = 4;
    options_.per_device = 40;
  }

  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const ConvertOptions& one : form_candidates(options_)) {
      out.push_back(form_text(one.form, *one.branches));
    }
    return out;
  }
  std::unique_ptr<WorkFolder> claimed() const {
    return claim_output(options_, open_inputs(form_candidates(options_).front()));
  }

  TempFolder folder_;
  ConvertOptions options_;
};

TEST_F(FormChoiceTest, CandidatesAreTheWaysToDivideHeadsAndLatents) {
  // gtpla-4 is mlra-2, mlra-4 is tpla-4.
  EXPECT_EQ(names(), (std::vector<std::string>{"gla-4", "tpla-4", "mlra-2"}));
  options_.devices = 2;
  EXPECT_EQ(names(), (std::vector<std::string>{"gla-2", "tpla-2"}));
  // More groups than heads there are not.
  options_.devices = 8;
  EXPECT_EQ(names(), (std::vector<std::string>{"tpla-8", "gtpla-8"}));
  // The authors' layout has one form.
  options_.devices = 2;
  options_.engine = "gla";
  EXPECT_EQ(names(), (std::vector<std::string>{"gla-2"}));
}

TEST_F(FormChoiceTest, RefusesWhatItCannotCompare) {
  const auto refused = [this](const std::vector<std::string>& words, const auto& change) {
    const ConvertOptions before = options_;
    change(options_);
    expect_error(ErrorKind::usage, words, [&] { form_candidates(options_); });
    options_ = before;
  };
  refused({"--to auto", "--devices"}, [](ConvertOptions& o) { o.devices.reset(); });
  refused({"--to auto", "--to mla"}, [](ConvertOptions& o) { o.devices = 1; });
  refused({"--per-device"}, [](ConvertOptions& o) { o.per_device.reset(); });
  refused({"--calibration"}, [](ConvertOptions& o) { o.calibration.reset(); });
  refused({"--method relatent"}, [](ConvertOptions& o) { o.method = Method::weights_only; });
  refused({"--branches"}, [](ConvertOptions& o) { o.branches = 2; });
  refused({"--key-rank"}, [](ConvertOptions& o) { o.key_rank = 8; });
  refused({"--engine deepseek", "2 devices"}, [](ConvertOptions& o) {
    o.engine = "deepseek";
    o.devices = 2;
  });
}

TEST_F(FormChoiceTest, TakesTheOneThatLosesLeast) {
  std::vector<TriedForm> heard;
  const std::unique_ptr<WorkFolder> work = claimed();
  const FormChoice choice =
      choose_form(form_candidates(options_), *work, [&](const TriedForm& form) { heard.push_back(form); });
  ASSERT_EQ(choice.tried.size(), 3U);
  const TriedForm& best = choice.tried.front();
  EXPECT_EQ(choice.options.form, best.form);
  EXPECT_EQ(choice.options.branches, best.branches);
  EXPECT_EQ(
      std::count_if(choice.tried.begin(), choice.tried.end(), [](const TriedForm& f) { return f.searched; }),
      2);
  for (const TriedForm& trial : heard) {
    EXPECT_GE(trial.best.nats, best.best.nats);
    // What fills a device: the rotary key, what its group shares, and its own part of the rest.
    const Index groups = trial.form == "mlra" ? 2 : 1;
    const Index shared = groups * trial.best.key_rank;
    EXPECT_EQ(trial.best.rope_dim + trial.best.key_rank + (trial.best.rank - shared) / 4, 40);
  }
  // The search of that form alone ends with the same sizes, and makes none of its trials again.
  std::vector<SizeTrial> again;
  const ConvertPlan plan = plan_conversion(choice.options, open_inputs(choice.options), work.get(),
                                           [&](const SizeTrial& trial) { again.push_back(trial); });
  EXPECT_TRUE(again.empty());
  EXPECT_EQ(plan.shape.qk_rope_head_dim, best.best.rope_dim);
  EXPECT_EQ(plan.shape.kv_lora_rank, best.best.rank);
}

TEST_F(FormChoiceTest, FormsWithoutRoomAreLeftOut) {
  // A group's head reads 64 numbers, so a latent of GLA's has no use for 80.
  options_.per_device = 120;
  const FormChoice choice = choose_form(form_candidates(options_), *claimed(), {});
  for (const TriedForm& form : choice.tried) {
    EXPECT_NE(form.form, "gla");
  }
  // None has any for this.
  std::filesystem::remove_all(options_.output.string() + ".partial");
  options_.per_device = 2;
  expect_error(ErrorKind::usage, {"--per-device 2"},
               [&] { choose_form(form_candidates(options_), *claimed(), {}); });
}

}  // namespace
}  // namespace relatent
