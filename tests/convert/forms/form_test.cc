#include "convert/forms/form.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "convert/latent/partition.h"

namespace relatent {
namespace {

TEST(PartitionOf, KnowsEveryForm) {
  struct Case {
    std::string form;
    Index branches;
    Index groups;
    Index parts;
  };
  for (const Case& test :
       {Case{"mla", 1, 1, 1}, Case{"gla", 2, 2, 1}, Case{"gla", 3, 3, 1}, Case{"gla", 8, 8, 1},
        Case{"tpla", 2, 1, 2}, Case{"tpla", 4, 1, 4}, Case{"tpla", 5, 1, 5}, Case{"mlra", 2, 2, 2},
        Case{"mlra", 4, 1, 4}, Case{"gtpla", 4, 2, 2}, Case{"gtpla", 8, 4, 2}}) {
    SCOPED_TRACE(test.form + " " + std::to_string(test.branches));
    const std::optional<Partition> found = partition_of(test.form, test.branches);
    ASSERT_TRUE(found.has_value());
    EXPECT_EQ(found->groups, test.groups);
    EXPECT_EQ(found->parts, test.parts);
    EXPECT_EQ(found->latents(), test.groups * test.parts);
  }
}

TEST(PartitionOf, RefusesWhatThereIsNot) {
  for (const Index branches : {-1, 0, 1, 3, 5, 8}) {
    EXPECT_FALSE(partition_of("mlra", branches).has_value()) << branches;
    EXPECT_FALSE(partition_of("gqa", branches).has_value()) << branches;
    EXPECT_FALSE(partition_of("", branches).has_value()) << branches;
  }
  for (const Index branches : {-1, 0, 1, 2, 3, 5, 7}) {
    EXPECT_FALSE(partition_of("gtpla", branches).has_value()) << branches;
  }
  for (const Index branches : {-1, 0, 2, 4}) {
    EXPECT_FALSE(partition_of("mla", branches).has_value()) << branches;
  }
  for (const Index branches : {-1, 0, 1}) {
    EXPECT_FALSE(partition_of("gla", branches).has_value()) << branches;
    EXPECT_FALSE(partition_of("tpla", branches).has_value()) << branches;
  }
}

TEST(Partition, HeadGroupsAreAsEvenAsCanBe) {
  const Partition four{4, 1};
  const std::vector<Index> expected = {0, 1, 3, 4, 6};
  for (Index g = 0; g <= 4; ++g) {
    EXPECT_EQ(four.first_head(g, 6), expected[static_cast<std::size_t>(g)]);
  }
  for (const Index groups : {1, 2, 3, 4, 7}) {
    for (const Index heads : {7, 8, 12, 30}) {
      const Partition partition{groups, 2};
      EXPECT_EQ(partition.first_head(0, heads), 0);
      EXPECT_EQ(partition.first_head(groups, heads), heads);
      for (Index g = 0; g < groups; ++g) {
        const Index count = partition.first_head(g + 1, heads) - partition.first_head(g, heads);
        EXPECT_GE(count, heads / groups);
        EXPECT_LE(count, (heads + groups - 1) / groups);
      }
    }
  }
}

TEST(Partition, NumbersLatentsPartByPart) {
  const Partition mlra = *partition_of("mlra", 2);
  EXPECT_EQ(mlra.latent(0, 0), 0);
  EXPECT_EQ(mlra.latent(1, 0), 1);
  EXPECT_EQ(mlra.latent(0, 1), 2);
  EXPECT_EQ(mlra.latent(1, 1), 3);
  for (Index i = 0; i < 4; ++i) {
    EXPECT_EQ(partition_of("gla", 4)->latent(i, 0), i);
    EXPECT_EQ(partition_of("tpla", 4)->latent(0, i), i);
  }
}

}  // namespace
}  // namespace relatent
