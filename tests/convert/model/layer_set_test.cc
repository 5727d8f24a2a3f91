#include "convert/model/layer_set.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/expect_error.h"

namespace relatent {
namespace {

using testing_support::expect_error;

TEST(LayerSet, ReadsLayersAndRanges) {
  const LayerSet set = LayerSet::parse("--layers", "7,0-2,4,1", 8);
  EXPECT_EQ(set.layers(), (std::vector<Index>{0, 1, 2, 4, 7}));
  EXPECT_EQ(set.text(), "0-2, 4, 7");
  EXPECT_EQ(set.others(8).layers(), (std::vector<Index>{3, 5, 6}));
  EXPECT_EQ(set.others(8).text(), "3, 5-6");
  for (Index i = 0; i < 8; ++i) {
    EXPECT_NE(set.has(i), set.others(8).has(i)) << i;
    EXPECT_EQ(set.before(i) + set.others(8).before(i), i);
  }
  EXPECT_EQ(LayerSet::parse("--layers", "3-3", 8).text(), "3");
}

TEST(LayerSet, OfNoLayers) {
  EXPECT_TRUE(LayerSet().empty());
  EXPECT_FALSE(LayerSet().has(0));
  EXPECT_EQ(LayerSet().text(), "");
  EXPECT_EQ(LayerSet().others(2).text(), "0-1");
  EXPECT_TRUE(LayerSet().others(2).others(2).empty());
}

TEST(LayerSet, RefusesWhatIsNone) {
  for (const char* text :
       {"", ",", "1,", "a", "1-", "-1", "2-1", "1-2-3", "1;2", "1 ", "99999999999999999999"}) {
    SCOPED_TRACE(text);
    expect_error(ErrorKind::usage,
                 {"--layers takes layers and ranges of them, like 0-5,8, not \"" + std::string(text) + "\""},
                 [&] { LayerSet::parse("--layers", text, 8); });
  }
  expect_error(ErrorKind::usage, {"--layers names layer 8 of a model whose layers are 0 to 7"},
               [] { LayerSet::parse("--layers", "2-8", 8); });
}

}  // namespace
}  // namespace relatent
