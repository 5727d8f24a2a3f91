#include "convert/plan/size_candidates.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "convert/plan/plan.h"
#include "convert/plan/sizes.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::TempFolder;
using testing_support::tiny_latent_model;
using testing_support::tiny_model;
using testing_support::TinyModel;

// "16+80 16+112(8 shared)"
std::string text(const std::vector<CacheSizes>& sizes) {
  std::string out;
  for (const CacheSizes& one : sizes) {
    out += (out.empty() ? "" : " ") + std::to_string(one.rope_dim) + "+" + std::to_string(one.rank) +
           (one.key_rank > 0 ? "(" + std::to_string(one.key_rank) + " shared)" : "");
  }
  return out;
}

constexpr GqaGeometry heads_of(Index size, Index count = 1) {
  return {.num_key_value_heads = count, .head_dim = size, .rotary_dim = size};
}
constexpr GqaGeometry trained = heads_of(32, 4);

TEST(RotaryCandidates, AreAQuarterAndItsNeighbours) {
  EXPECT_EQ(text(rotary_candidates(trained, false, 128)), "16+112 32+96 48+80");
  EXPECT_EQ(text({middle_candidate(trained, false, 128)}), "32+96");
  // A plain list has no more than the head.
  EXPECT_EQ(text(rotary_candidates(trained, true, 128)), "16+112 32+96");
  EXPECT_EQ(text(rotary_candidates(trained, false, 32)), "16+16");
  EXPECT_EQ(text(rotary_candidates(heads_of(8), false, 32)), "8+24");
}

TEST(CacheBisection, EndsBetweenTooLittleAndEnough) {
  CacheBisection range(trained);
  EXPECT_EQ(range.whole(), 256);
  EXPECT_EQ(range.reachable().front(), 32);
  EXPECT_EQ(range.reachable().back(), 256);
  EXPECT_EQ(range.reachable().size(), 15U);
  for (const Index total : {128, 64, 96, 112}) {
    EXPECT_FALSE(range.over());
    EXPECT_EQ(range.next(), total);
    range.tell(total == 128);
  }
  EXPECT_TRUE(range.over());
  EXPECT_EQ(range.reachable(), std::vector<Index>{128});
  EXPECT_TRUE(CacheBisection(heads_of(16)).over());
}

TEST(TrialSequences, OneIsNotEnough) {
  EXPECT_NO_THROW(check_trial_sequences({.count = 2, .length = 4, .tokens = {}}));
  expect_error(ErrorKind::usage, {"only one", "--rope-dim"},
               [] { check_trial_sequences({.count = 1, .length = 4, .tokens = {}}); });
}

// Eight heads on two key/value heads of 8: 16 keys and 16 values, of which a group of four heads reads half.
class SplitSizes : public testing::Test {
 protected:
  ConvertOptions options(const std::string& form, Index branches, Index per_device,
                         const TinyModel& model = tiny_model({.heads = 8})) {
    std::filesystem::remove_all(folder_ / "source");
    model.write(folder_ / "source");
    ConvertOptions out;
    out.source = folder_ / "source";
    out.form = form;
    out.branches = branches;
    out.per_device = per_device;
    return out;
  }
  static DeviceSplit split(const ConvertOptions& options) {
    const ConvertInputs inputs = open_inputs(options);
    return {completed(options, inputs), inputs};
  }
  static LatentShape shape(const ConvertOptions& options) {
    const ConvertInputs inputs = open_inputs(options);
    return choose_shape(completed(options, inputs), inputs);
  }

 private:
  TempFolder folder_;
};

TEST_F(SplitSizes, AThirdEachIsTriedFirst) {
  ConvertOptions given = options("tpla", 2, 24);
  EXPECT_EQ(text({split(given).first()}), "8+24(8 shared)");
  EXPECT_EQ(split(given).step(), 8);
  EXPECT_EQ(text(split(given).reachable()), "8+24(8 shared) 8+32 16+16");
  EXPECT_FALSE(split(given).with(16, 8));
  EXPECT_FALSE(split(given).with(24, 0));
  given.rope_dim = 8;
  EXPECT_FALSE(split(given).moves_rotary());
  EXPECT_EQ(text(split(given).reachable()), "8+24(8 shared) 8+32");
  given.rope_dim.reset();
  given.key_rank = 0;
  EXPECT_FALSE(split(given).moves_keys());
  EXPECT_EQ(text(split(given).reachable()), "8+32 16+16");
  given.per_device = 8;
  expect_error(ErrorKind::usage, {"--per-device 8", "no room", "rotary key of 8"}, [&] { split(given); });
}

TEST_F(SplitSizes, AnMlaSourceKeepsItsRotaryKey) {
  const TinyModel model = tiny_latent_model();
  const Index rope_dim = model.config["qk_rope_head_dim"].get<Index>();
  const ConvertOptions given = options("tpla", 2, rope_dim + 12, model);
  EXPECT_FALSE(split(given).moves_rotary());
  EXPECT_TRUE(split(given).moves_keys());
  for (const CacheSizes& sizes : split(given).reachable()) {
    EXPECT_EQ(sizes.rope_dim, rope_dim);
  }
}

// What no latent or layout holds is neither tried nor planned.
TEST_F(SplitSizes, StayWithinWhatALatentHolds) {
  ConvertOptions given = options("gla", 2, 24);
  EXPECT_EQ(text(split(given).reachable()), "8+32 16+16");
  given.relatent.plain_list = true;
  EXPECT_EQ(text(split(given).reachable()), "8+32");
  given.per_device = 32;
  expect_error(ErrorKind::usage, {"--per-device 32", "more than a latent can hold", "rotary key of 8"},
               [&] { split(given); });
  given.per_device = 20;
  given.engine = "gla";
  EXPECT_EQ(text(split(given).reachable()), "8+24");
  given.per_device = 24;
  expect_error(ErrorKind::usage, {"--per-device 24", "more than a latent can hold"}, [&] { split(given); });
}

TEST_F(SplitSizes, LatentsHoldNoMoreThanTheirHeadsRead) {
  ConvertOptions given = options("gla", 2, 24);
  given.per_device.reset();
  given.rope_dim = 8;
  given.rank = 32;
  EXPECT_EQ(shape(given).kv_lora_rank, 32);
  given.rank = 34;
  expect_error(ErrorKind::usage, {"--rank 34", "full rank 32"}, [&] { shape(given); });
  given.form = "mlra";
  given.key_rank = 16;
  given.rank = 40;
  EXPECT_EQ(shape(given).kv_lora_rank, 40);
  given.key_rank = 17;
  expect_error(ErrorKind::usage, {"--key-rank 17", "at most 16"}, [&] { shape(given); });
  given.key_rank = 4;
  given.rope_dim = 16;
  EXPECT_EQ(shape(given).qk_rope_head_dim, 16);
  given.relatent.plain_list = true;
  expect_error(ErrorKind::usage, {"--rope-dim 16", "plain list", "head_dim = 8"}, [&] { shape(given); });
  given.form = "gla";
  given.branches = 16;
  expect_error(ErrorKind::usage, {"--branches 16", "8 heads"}, [&] { open_inputs(given); });
}

}  // namespace
}  // namespace relatent
