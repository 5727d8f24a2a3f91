#include "convert/model/devices.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/latents.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::latent_samples;
using testing_support::LatentSample;
using testing_support::output_by_the_book;
using testing_support::output_of;
using testing_support::Random;
using testing_support::random_latent;
using testing_support::relative_error;
using testing_support::sample_inputs;

LatentSizes geometry_of(const LatentSample& sample) {
  const LatentShape shape = testing_support::shape_of(sample);
  const LatentSizes& sizes = shape;
  return sizes;
}

TEST(WhyNotShared, SaysWhatDoesNotDivide) {
  const LatentSizes one = geometry_of({.name = "", .form = "mla", .branches = 1, .heads = 6});
  EXPECT_EQ(why_not_shared(one, 1), "");
  EXPECT_EQ(why_not_shared(one, 2), "");
  EXPECT_EQ(why_not_shared(one, 3), "");
  EXPECT_EQ(why_not_shared(one, 6), "");
  EXPECT_EQ(why_not_shared(one, 4), "each latent would go to 4 devices, which do not divide its 6 heads");
  EXPECT_EQ(why_not_shared(one, 0), "there must be at least one device");
  EXPECT_EQ(why_not_shared(one, -2), "there must be at least one device");

  const LatentSizes two = geometry_of({.name = "", .form = "tpla", .branches = 2, .heads = 6});
  EXPECT_EQ(why_not_shared(two, 1), "");
  EXPECT_EQ(why_not_shared(two, 2), "");
  EXPECT_EQ(why_not_shared(two, 3), "3 devices are not a multiple of 2 latents");
  EXPECT_EQ(why_not_shared(two, 4), "");
  EXPECT_EQ(why_not_shared(two, 8), "each latent would go to 4 devices, which do not divide its 6 heads");

  // Heads 1, 2, 1 and 2.
  const LatentSizes four = geometry_of({.name = "", .form = "gla", .branches = 4, .heads = 6});
  EXPECT_EQ(why_not_shared(four, 2), "");
  EXPECT_EQ(why_not_shared(four, 3), "3 devices do not divide 4 latents");
  EXPECT_EQ(why_not_shared(four, 4), "");
  EXPECT_EQ(why_not_shared(four, 6), "6 devices are not a multiple of 4 latents");
  EXPECT_EQ(why_not_shared(four, 8), "each latent would go to 2 devices, which do not divide its 1 heads");
}

TEST(DeviceShares, RefuseWithTheReason) {
  const LatentSizes two = geometry_of({.name = "", .branches = 2, .heads = 6});
  expect_error(ErrorKind::usage,
               {"--tp 3 does not fit this model", "3 devices are not a multiple of 2 latents"},
               [&] { device_shares(two, 3); });
  expect_error(ErrorKind::usage, {"--tp 8", "do not divide its 6 heads"}, [&] { device_shares(two, 8); });
  expect_error(ErrorKind::usage, {"--tp 0", "at least one device"}, [&] { device_shares(two, 0); });
}

void expect_share(const DeviceShare& share, const DeviceShare& expected) {
  EXPECT_EQ(share.first_head, expected.first_head);
  EXPECT_EQ(share.head_count, expected.head_count);
  EXPECT_EQ(share.shared, expected.shared);
  ASSERT_EQ(share.branches.size(), expected.branches.size());
  for (std::size_t i = 0; i < share.branches.size(); ++i) {
    EXPECT_EQ(share.branches[i].branch, expected.branches[i].branch);
    EXPECT_EQ(share.branches[i].first_head, expected.branches[i].first_head);
    EXPECT_EQ(share.branches[i].head_count, expected.branches[i].head_count);
  }
}

void expect_shares(const LatentSizes& latent, const std::vector<DeviceShare>& expected,
                   const std::vector<Index>& numbers) {
  const std::vector<DeviceShare> found = device_shares(latent, static_cast<Index>(expected.size()));
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    SCOPED_TRACE(std::to_string(i) + " of " + std::to_string(found.size()));
    expect_share(found[i], expected[i]);
    EXPECT_EQ(found[i].cache_elements(latent), numbers[i]);
  }
}

// p = 6, r = 11.
TEST(DeviceShares, OfOneLatentDivideItsHeads) {
  const LatentSizes one = geometry_of({.name = "", .form = "mla", .branches = 1, .heads = 8});
  expect_shares(one, {{0, 8, {{0, 0, 8}}, {}}}, {17});
  expect_shares(one, {{0, 4, {{0, 0, 4}}, {}}, {4, 4, {{0, 4, 4}}, {}}}, {17, 17});
  expect_shares(
      one,
      {{0, 2, {{0, 0, 2}}, {}}, {2, 2, {{0, 2, 2}}, {}}, {4, 2, {{0, 4, 2}}, {}}, {6, 2, {{0, 6, 2}}, {}}},
      {17, 17, 17, 17});
  const std::vector<DeviceShare> eight = device_shares(one, 8);
  ASSERT_EQ(eight.size(), 8U);
  for (Index i = 0; i < 8; ++i) {
    expect_share(eight[static_cast<std::size_t>(i)], {i, 1, {{0, i, 1}}, {}});
  }
}

// 3 shared coordinates, 4 and 4 own.
TEST(DeviceShares, OfTwoPartsTakeOneEach) {
  const LatentSizes two = geometry_of({.name = "", .form = "tpla", .branches = 2, .heads = 8});
  expect_shares(two, {{0, 8, {{0, 0, 8}, {1, 0, 8}}, {0}}}, {6 + 11});
  expect_shares(two, {{0, 8, {{0, 0, 8}}, {0}}, {0, 8, {{1, 0, 8}}, {0}}}, {6 + 7, 6 + 7});
  expect_shares(two,
                {{0, 4, {{0, 0, 4}}, {0}},
                 {4, 4, {{0, 4, 4}}, {0}},
                 {0, 4, {{1, 0, 4}}, {0}},
                 {4, 4, {{1, 4, 4}}, {0}}},
                {13, 13, 13, 13});
  const std::vector<DeviceShare> eight = device_shares(two, 8);
  ASSERT_EQ(eight.size(), 8U);
  for (Index i = 0; i < 8; ++i) {
    expect_share(eight[static_cast<std::size_t>(i)], {i % 4 * 2, 2, {{i / 4, i % 4 * 2, 2}}, {0}});
  }
}

// Ranks 11, 12, 13 and 14; heads 0, 1-2, 3 and 4-5.
TEST(DeviceShares, OfUnevenHeadGroups) {
  const LatentSizes four = geometry_of({.name = "", .form = "gla", .branches = 4, .heads = 6});
  expect_shares(four, {{0, 6, {{0, 0, 1}, {1, 1, 2}, {2, 3, 1}, {3, 4, 2}}, {}}}, {6 + 50});
  expect_shares(four, {{0, 3, {{0, 0, 1}, {1, 1, 2}}, {}}, {3, 3, {{2, 3, 1}, {3, 4, 2}}, {}}},
                {6 + 23, 6 + 27});
  expect_shares(
      four,
      {{0, 1, {{0, 0, 1}}, {}}, {1, 2, {{1, 1, 2}}, {}}, {3, 1, {{2, 3, 1}}, {}}, {4, 2, {{3, 4, 2}}, {}}},
      {17, 18, 19, 20});
}

// Latents 0 and 2 belong to the first half of the heads, 1 and 3 to the second: 4 and 4 own coordinates
// beside 3, and 4 and 5.
TEST(DeviceShares, KeepLatentsOfTheSameHeadsTogether) {
  const LatentSizes mlra = geometry_of({.name = "", .form = "mlra", .branches = 2, .heads = 8});
  expect_shares(mlra, {{0, 8, {{0, 0, 4}, {2, 0, 4}, {1, 4, 4}, {3, 4, 4}}, {0, 1}}}, {6 + 23});
  expect_shares(mlra, {{0, 4, {{0, 0, 4}, {2, 0, 4}}, {0}}, {4, 4, {{1, 4, 4}, {3, 4, 4}}, {1}}},
                {6 + 11, 6 + 12});
  expect_shares(mlra,
                {{0, 4, {{0, 0, 4}}, {0}},
                 {0, 4, {{2, 0, 4}}, {0}},
                 {4, 4, {{1, 4, 4}}, {1}},
                 {4, 4, {{3, 4, 4}}, {1}}},
                {6 + 7, 6 + 7, 6 + 7, 6 + 8});
  expect_shares(mlra,
                {{0, 2, {{0, 0, 2}}, {0}},
                 {2, 2, {{0, 2, 2}}, {0}},
                 {0, 2, {{2, 0, 2}}, {0}},
                 {2, 2, {{2, 2, 2}}, {0}},
                 {4, 2, {{1, 4, 2}}, {1}},
                 {6, 2, {{1, 6, 2}}, {1}},
                 {4, 2, {{3, 4, 2}}, {1}},
                 {6, 2, {{3, 6, 2}}, {1}}},
                {13, 13, 13, 13, 13, 13, 14, 14});
}

TEST(PartOf, DevicesAddUpToTheLayer) {
  for (const LatentSample& sample : latent_samples()) {
    Random random(1);
    const LatentSizes geometry = geometry_of(sample);
    const LatentAttention whole = random_latent(random, sample, 24);
    const MatrixF x = sample_inputs(random, 30, 24);
    const MatrixD expected = output_by_the_book(whole, x);
    EXPECT_LE(relative_error(output_of(whole, x), expected), kFloatNoise);
    Index sizes = 0;
    for (const Index tp : {1, 2, 3, 4, 6, 8}) {
      if (!why_not_shared(geometry, tp).empty()) {
        continue;
      }
      SCOPED_TRACE(sample.name + " on " + std::to_string(tp));
      ++sizes;
      MatrixD sum = MatrixD::Zero(x.rows(), 24);
      const std::vector<DeviceShare> shares = device_shares(geometry, tp);
      for (std::size_t i = 0; i < shares.size(); ++i) {
        const LatentAttention part = part_of(whole, shares[i], i == 0);
        EXPECT_EQ(part.heads, shares[i].head_count);
        EXPECT_EQ(part.total_rank() + part.rope_dim, shares[i].cache_elements(geometry));
        // A layer of its own, as the book reads it.
        EXPECT_LE(relative_error(output_of(part, x), output_by_the_book(part, x)), kFloatNoise);
        sum += output_of(part, x).cast<double>();
      }
      EXPECT_LE(relative_error(sum, expected), kFloatNoise);
    }
    EXPECT_GE(sizes, 2);
  }
}

// Queries of every head's own, keys and values of all.
TEST(PartOf, NormalisedHeadsGoWithTheirQueries) {
  Random random(3);
  const LatentSample sample{.name = "", .branches = 2, .heads = 8, .bias = true};
  for (const bool wide : {false, true}) {
    SCOPED_TRACE(wide);
    LatentAttention whole = random_latent(random, sample, 20);  // 20 numbers of normed heads
    const Index d = 5;
    NormedHeads heads;
    heads.head_dim = d;
    heads.q = random.linear(8 * d, 24, true);
    heads.k = random.linear(2 * d, 24, true);
    heads.v = random.linear(2 * d, 24, false);
    heads.q_norm = {random.row(wide ? 8 * d : d), 1e-6F};
    heads.k_norm = {random.row(wide ? 2 * d : d), 1e-6F};
    whole.normed_heads = heads;
    whole.q = random.linear(whole.q.out(), d, true);
    whole.o = random.linear(24, whole.o.weight.cols(), true);
    const MatrixF x = sample_inputs(random, 30, 24);
    const MatrixF expected = output_of(whole, x);
    for (const Index tp : {1, 2, 4, 8}) {
      MatrixD sum = MatrixD::Zero(x.rows(), 24);
      const std::vector<DeviceShare> shares = device_shares(geometry_of(sample), tp);
      for (std::size_t i = 0; i < shares.size(); ++i) {
        sum += output_of(part_of(whole, shares[i], i == 0), x).cast<double>();
      }
      EXPECT_LE(relative_error(sum, expected.cast<double>()), kFloatNoise) << tp;
    }
  }
}

TEST(PartOf, OneDeviceAddsTheBias) {
  Random random(2);
  const LatentSample sample{.name = "", .branches = 2, .heads = 8, .bias = true};
  const LatentAttention whole = random_latent(random, sample, 24);
  const MatrixF x = sample_inputs(random, 10, 24);
  for (const DeviceShare& share : device_shares(geometry_of(sample), 4)) {
    const LatentAttention with = part_of(whole, share, true);
    const LatentAttention without = part_of(whole, share, false);
    EXPECT_TRUE(with.o.bias == whole.o.bias);
    EXPECT_EQ(without.o.bias.size(), 0);
    const MatrixD difference = (output_of(with, x) - output_of(without, x)).cast<double>();
    EXPECT_LE(relative_error(difference, MatrixD(whole.o.bias.cast<double>().replicate(10, 1))), kFloatNoise);
    // Biases of queries and latents stay.
    EXPECT_EQ(without.q.bias.size(), share.head_count * (5 + 6));
    EXPECT_TRUE(without.shared[0].bias == whole.shared[0].bias);
  }
}

}  // namespace
}  // namespace relatent
