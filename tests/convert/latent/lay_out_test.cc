#include "convert/latent/lay_out.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "convert/compute/cpu/attention.h"
#include "convert/forms/form.h"
#include "convert/latent/assemble.h"
#include "convert/latent/lossless.h"
#include "tests/support/latents.h"

namespace relatent {
namespace {

using testing_support::GqaSample;
using testing_support::kFloatNoise;
using testing_support::layer_sample;
using testing_support::LayerSample;
using testing_support::mix_by_the_book;
using testing_support::output_of;
using testing_support::Random;
using testing_support::relative_error;
using testing_support::sample_inputs;

void expect_branch(const BranchGeometry& branch, const BranchGeometry& expected) {
  EXPECT_EQ(branch.first_head, expected.first_head);
  EXPECT_EQ(branch.head_count, expected.head_count);
  EXPECT_EQ(branch.rank, expected.rank);
  EXPECT_EQ(branch.shared, expected.shared);
}

TEST(LayOut, DividesWhatIsNotShared) {
  LatentShape shape;
  shape.heads = 6;
  lay_out({1, 4}, {{3, 13}}, shape);
  EXPECT_EQ(shape.kv_lora_rank, 13);
  EXPECT_EQ(shape.shared_ranks, std::vector<Index>{3});
  ASSERT_EQ(shape.branches.size(), 4U);
  const std::vector<Index> ranks = {2, 3, 2, 3};
  for (std::size_t b = 0; b < 4; ++b) {
    expect_branch(shape.branches[b], {0, 6, ranks[b], 0});
    EXPECT_EQ(shape.branches[b].whole_rank(shape.shared_ranks), ranks[b] + 3);
  }
  // Nothing of an earlier shape stays, and nothing shared is no latent of rank 0.
  lay_out({1, 2}, {{0, 7}}, shape);
  EXPECT_EQ(shape.kv_lora_rank, 7);
  EXPECT_TRUE(shape.shared_ranks.empty());
  ASSERT_EQ(shape.branches.size(), 2U);
  expect_branch(shape.branches[0], {0, 6, 3});
  expect_branch(shape.branches[1], {0, 6, 4});
}

TEST(LayOut, ASinglePartSharesWithNobody) {
  LatentShape shape;
  shape.heads = 6;
  lay_out({4, 1}, {{2, 5}, {0, 6}, {7, 7}, {1, 8}}, shape);
  EXPECT_EQ(shape.kv_lora_rank, 26);
  EXPECT_TRUE(shape.shared_ranks.empty());
  ASSERT_EQ(shape.branches.size(), 4U);
  expect_branch(shape.branches[0], {0, 1, 5});
  expect_branch(shape.branches[1], {1, 2, 6});
  expect_branch(shape.branches[2], {3, 1, 7});
  expect_branch(shape.branches[3], {4, 2, 8});
}

TEST(LayOut, GroupsOfPartsShareWithinThemselves) {
  LatentShape shape;
  shape.heads = 5;
  lay_out(*partition_of("mlra", 2), {{2, 7}, {3, 10}}, shape);
  EXPECT_EQ(shape.kv_lora_rank, 17);
  EXPECT_EQ(shape.shared_ranks, (std::vector<Index>{2, 3}));
  ASSERT_EQ(shape.branches.size(), 4U);
  expect_branch(shape.branches[0], {0, 2, 2, 0});
  expect_branch(shape.branches[1], {2, 3, 3, 1});
  expect_branch(shape.branches[2], {0, 2, 3, 0});
  expect_branch(shape.branches[3], {2, 3, 4, 1});
  // One of the groups may share nothing.
  lay_out(*partition_of("mlra", 2), {{0, 6}, {3, 9}}, shape);
  EXPECT_EQ(shape.shared_ranks, std::vector<Index>{3});
  expect_branch(shape.branches[2], {0, 2, 3});
  expect_branch(shape.branches[3], {2, 3, 3, 0});
}

// A layer with a branch for each group whose scores read the first key_rank coordinates only.
LatentAttention grouped_layer(Random& random, const Partition& partition, Index heads,
                              const std::vector<GroupSizes>& groups, bool bias, Index hidden) {
  LatentAttention out = testing_support::random_latent(
      random, {.name = "", .form = "mla", .branches = 1, .heads = heads, .bias = bias}, hidden);
  out.branches.clear();
  const Index n = out.nope_dim;
  const Index w = out.v_dim;
  for (Index g = 0; g < partition.groups; ++g) {
    const GroupSizes& sizes = groups[static_cast<std::size_t>(g)];
    LatentBranch branch;
    branch.first_head = partition.first_head(g, heads);
    branch.head_count = partition.first_head(g + 1, heads) - branch.first_head;
    branch.down = random.linear(sizes.rank, hidden, bias);
    branch.up = random.matrix(branch.head_count * (n + w), sizes.rank, 0.4);
    branch.mean_square = 0.5 + static_cast<double>(g);
    for (Index h = 0; h < branch.head_count; ++h) {
      branch.up.block(h * (n + w), sizes.key_rank, n, sizes.rank - sizes.key_rank).setZero();
    }
    out.branches.push_back(std::move(branch));
  }
  return out;
}

struct SplitCase {
  std::string form;
  Index branches;
  Index heads;
  std::vector<GroupSizes> groups;
};

TEST(SplitValues, ReturnsTheGroupedLayer) {
  for (const SplitCase& test :
       {SplitCase{"tpla", 2, 6, {{3, 9}}}, SplitCase{"tpla", 2, 6, {{0, 7}}},
        SplitCase{"tpla", 4, 5, {{4, 13}}}, SplitCase{"tpla", 4, 5, {{0, 9}}},
        SplitCase{"mlra", 2, 6, {{3, 8}, {2, 9}}}, SplitCase{"mlra", 2, 5, {{0, 6}, {0, 5}}},
        SplitCase{"mlra", 2, 5, {{0, 6}, {2, 7}}}, SplitCase{"mlra", 4, 6, {{5, 15}}}}) {
    for (const bool bias : {false, true}) {
      SCOPED_TRACE(test.form + " " + std::to_string(test.branches) + ", " +
                   std::to_string(test.groups.front().key_rank) + (bias ? " shared, biases" : " shared"));
      Random random(1);
      const Index hidden = 24;
      const MatrixF x = sample_inputs(random, 40, hidden);
      const Partition partition = *partition_of(test.form, test.branches);
      const LatentAttention grouped = grouped_layer(random, partition, test.heads, test.groups, bias, hidden);
      LatentShape shape;
      shape.heads = test.heads;
      lay_out(partition, test.groups, shape);
      const LatentAttention split = split_values(grouped, partition, shape);
      EXPECT_LE(relative_error(output_of(split, x), output_of(grouped, x)), kFloatNoise);
      const RotaryTable table(split.rotary, x.rows());
      EXPECT_LE(relative_error(attention_forward(split, x, table), mix_by_the_book(grouped, x)), kFloatNoise);

      // As the shape says.
      EXPECT_EQ(split.total_rank(), shape.kv_lora_rank);
      ASSERT_EQ(split.shared.size(), shape.shared_ranks.size());
      for (std::size_t s = 0; s < split.shared.size(); ++s) {
        EXPECT_EQ(split.shared[s].out(), shape.shared_ranks[s]);
        EXPECT_EQ(split.shared[s].bias.size(), bias ? shape.shared_ranks[s] : 0);
      }
      ASSERT_EQ(split.branches.size(), shape.branches.size());
      for (std::size_t b = 0; b < split.branches.size(); ++b) {
        const LatentBranch& branch = split.branches[b];
        expect_branch({branch.first_head, branch.head_count, branch.down.out(), branch.shared},
                      shape.branches[b]);
        EXPECT_EQ(branch.up.cols(), shape.branches[b].whole_rank(shape.shared_ranks));
        EXPECT_EQ(branch.down.bias.size(), bias ? branch.down.out() : 0);
        EXPECT_EQ(branch.mean_square,
                  grouped.branches[b % static_cast<std::size_t>(partition.groups)].mean_square);
      }
    }
  }
}

TEST(SplitValues, SharedCoordinatesAreValuesOnce) {
  Random random(2);
  const std::vector<GroupSizes> sizes = {{3, 9}};
  const LatentAttention grouped = grouped_layer(random, {1, 2}, 4, sizes, false, 24);
  LatentShape shape;
  shape.heads = 4;
  lay_out({1, 2}, sizes, shape);
  const LatentAttention split = split_values(grouped, {1, 2}, shape);
  const Index n = grouped.nope_dim;
  const Index w = grouped.v_dim;
  for (Index h = 0; h < 4; ++h) {
    const Index row = h * (n + w);
    EXPECT_FALSE(split.branches[0].up.block(row + n, 0, w, 3).isZero(0));
    EXPECT_TRUE(split.branches[1].up.block(row + n, 0, w, 3).isZero(0));
    for (const LatentBranch& branch : split.branches) {
      EXPECT_TRUE(branch.up.block(row, 0, n, 3) == grouped.branches[0].up.block(row, 0, n, 3));
      EXPECT_TRUE(branch.up.block(row, 3, n, 3).isZero(0));
    }
  }
}

TEST(SplitValues, OfSinglePartsIsTheLayerItself) {
  Random random(3);
  const std::vector<GroupSizes> sizes = {{5, 5}, {6, 6}};
  const LatentAttention grouped = grouped_layer(random, {2, 1}, 5, sizes, true, 24);
  LatentShape shape;
  shape.heads = 5;
  lay_out({2, 1}, sizes, shape);
  const LatentAttention split = split_values(grouped, {2, 1}, shape);
  ASSERT_EQ(split.branches.size(), 2U);
  EXPECT_TRUE(split.shared.empty());
  for (std::size_t b = 0; b < 2; ++b) {
    EXPECT_TRUE(split.branches[b].up == grouped.branches[b].up);
    EXPECT_TRUE(split.branches[b].down.weight == grouped.branches[b].down.weight);
  }
  EXPECT_THROW(split_values(grouped, {1, 2}, shape), std::logic_error);
  EXPECT_THROW(split_values(grouped, {3, 1}, shape), std::logic_error);
}

// A part would not have all that the norm reads.
TEST(SplitValues, RefusesANormalisedLatent) {
  Random random(5);
  const std::vector<GroupSizes> sizes = {{3, 9}};
  LatentAttention grouped = grouped_layer(random, {1, 2}, 4, sizes, false, 24);
  grouped.branches[0].norm = {RowVectorF::Ones(9), 1e-6F};
  LatentShape shape;
  shape.heads = 4;
  lay_out({1, 2}, sizes, shape);
  EXPECT_THROW(split_values(grouped, {1, 2}, shape), std::logic_error);
  const LatentAttention whole = split_values(grouped, {1, 1}, shape);
  EXPECT_TRUE(whole.branches[0].norm.present());
}

// Values divided over the parts, each group's own where heads have latents of their own.
TEST(LosslessForms, ReturnTheSource) {
  struct Form {
    std::string name;
    Index branches;
  };
  const std::vector<GqaSample> samples = {
      {},
      {.name = "all biases", .q_bias = true, .kv_bias = true, .o_bias = true, .attention_factor = 1.25F},
      {.name = "groups across keys", .heads = 6, .kv_heads = 3, .head_dim = 6, .kv_bias = true},
      {.name = "one key", .heads = 4, .kv_heads = 1},
      {.name = "a key per head", .hidden = 20, .heads = 4, .kv_heads = 4, .head_dim = 6}};
  for (const GqaSample& gqa : samples) {
    const LayerSample sample = layer_sample(4, gqa);
    const MatrixF expected = output_of(sample.attention, sample.x);
    for (const Form& form : {Form{"gla", 2}, Form{"gla", 4}, Form{"tpla", 2}, Form{"tpla", 4},
                             Form{"mlra", 2}, Form{"mlra", 4}}) {
      SCOPED_TRACE(gqa.name + ", " + form.name + " " + std::to_string(form.branches));
      const Partition partition = *partition_of(form.name, form.branches);
      std::vector<JointLatent> latents;
      std::vector<GroupSizes> sizes;
      for (Index g = 0; g < partition.groups; ++g) {
        const Index first = partition.first_head(g, gqa.heads);
        const Index end = partition.first_head(g + 1, gqa.heads);
        latents.push_back(lossless_latent(sample.maps, first, end - first));
        const Index keys = sample.maps.group_of(end - 1) + 1 - sample.maps.group_of(first);
        // No more than the input has.
        EXPECT_EQ(latents.back().rank(), std::min(keys * gqa.head_dim, gqa.hidden + (gqa.kv_bias ? 1 : 0)));
        sizes.push_back({latents.back().key_rank.value_or(0), latents.back().rank()});
      }
      LatentShape shape;
      shape.heads = gqa.heads;
      lay_out(partition, sizes, shape);
      const LatentAttention grouped =
          assemble(sample.maps, sample.moments, lossless_rotary_key(sample.maps), latents, {});
      const LatentAttention split = split_values(grouped, partition, shape);
      EXPECT_EQ(static_cast<Index>(split.branches.size()), form.name == "mlra" ? 4 : form.branches);
      EXPECT_TRUE(split.shared.empty());
      EXPECT_EQ(split.total_rank(), shape.kv_lora_rank);
      EXPECT_LE(relative_error(output_of(split, sample.x), expected), kFloatNoise);
    }
  }
}

TEST(LosslessForms, GroupsHoldTheValuesTheyRead) {
  const LayerSample sample = layer_sample(5, {.heads = 6, .kv_heads = 2});
  const JointLatent second = lossless_latent(sample.maps, 1, 2);
  EXPECT_EQ(second.first_kv_head, 0);
  EXPECT_EQ(second.rank(), 8);
  EXPECT_TRUE(second.down == sample.maps.v.topRows(8));
  const JointLatent across = lossless_latent(sample.maps, 2, 2);
  EXPECT_EQ(across.rank(), 16);
  EXPECT_TRUE(across.down == sample.maps.v);
  const JointLatent last = lossless_latent(sample.maps, 4, 2);
  EXPECT_EQ(last.first_kv_head, 1);
  EXPECT_TRUE(last.down == sample.maps.v.bottomRows(8));
}

}  // namespace
}  // namespace relatent
