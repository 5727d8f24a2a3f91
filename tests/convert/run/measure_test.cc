#include "convert/run/measure.h"

#include <gtest/gtest.h>

#include <cmath>

#include "convert/plan/inputs.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::random_sequences;
using testing_support::TempFolder;
using testing_support::tiny_model;

Measurement lost(double nats) {
  Measurement out;
  out.held_out = true;
  out.logits.tokens = 2046;
  out.logits.source_nll = 2;
  out.logits.converted_nll = 2 + nats;
  out.logits.top1_agreement = 0.875;
  return out;
}

TEST(Measure, FewSequencesAreAllFittedOn) {
  EXPECT_EQ(default_held_out(1), 0);
  EXPECT_EQ(default_held_out(7), 0);
  EXPECT_EQ(default_held_out(8), 1);
  EXPECT_EQ(default_held_out(64), 2);
  EXPECT_EQ(default_held_out(1000), 4);
}

TEST(Measure, ACheckpointLosesNothingAgainstItself) {
  const TempFolder folder;
  tiny_model({}).write(folder.path());
  const Model model = Model::open(folder.path());
  const Measurement found = measure(model, folder.path(), random_sequences(1, 2, 20, 50), true);
  EXPECT_EQ(found.nats(), 0);
  EXPECT_EQ(found.logits.tokens, 2 * 19);
  EXPECT_EQ(found.logits.top1_agreement, 1);
  EXPECT_TRUE(found.held_out);
  EXPECT_EQ(loss_warning(found, {"a reason"}), "");
}

TEST(Measure, SaysInWordsWhatWasLost) {
  const std::string words = in_words(lost(0.5));
  for (const char* part :
       {"lost 0.5000 nats", "2046 held-out calibration tokens", "7.389 -> 12.18", "87.5 %"}) {
    EXPECT_NE(words.find(part), std::string::npos) << words;
  }
  Measurement seen = lost(0.5);
  seen.held_out = false;
  EXPECT_NE(in_words(seen).find("that the fits have seen"), std::string::npos);
}

TEST(Measure, WarnsOfWhatPeopleNoticeAndOfWhatIsOfNoUse) {
  EXPECT_EQ(loss_warning(lost(0.2), {}), "");
  const std::string noticed = loss_warning(lost(0.5), {"one", "two"});
  EXPECT_NE(noticed.find("will notice"), std::string::npos) << noticed;
  EXPECT_TRUE(noticed.ends_with(": one; two")) << noticed;
  const std::string useless = loss_warning(lost(1.5), {});
  EXPECT_NE(useless.find("NOT USABLE"), std::string::npos) << useless;
  EXPECT_NE(useless.find("33.12 instead of 7.389"), std::string::npos) << useless;
}

TEST(Measure, SurvivesTheJournal) {
  Measurement measured = lost(1.0 / 3);
  measured.logits.mean_kl = 0.1;
  measured.logits.rel_logit_error = 1e-7;
  const std::optional<Measurement> back = measurement_from(to_text(measured));
  ASSERT_TRUE(back);
  EXPECT_EQ(back->nats(), measured.nats());
  EXPECT_EQ(back->held_out, true);
  EXPECT_EQ(back->logits.tokens, 2046);
  EXPECT_EQ(back->logits.mean_kl, 0.1);
  EXPECT_EQ(back->logits.rel_logit_error, 1e-7);
  measured.logits.non_finite = 3;
  measured.logits.mean_kl = std::numeric_limits<double>::quiet_NaN();
  const std::optional<Measurement> broken = measurement_from(to_text(measured));
  ASSERT_TRUE(broken);
  EXPECT_EQ(broken->logits.non_finite, 3);
  EXPECT_TRUE(std::isnan(broken->logits.mean_kl));
  EXPECT_NE(loss_warning(*broken, {}).find("NaN or infinite at 3 positions"), std::string::npos);
  EXPECT_FALSE(measurement_from(""));
  EXPECT_FALSE(measurement_from("1 2"));
}

}  // namespace
}  // namespace relatent
