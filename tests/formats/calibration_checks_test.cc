#include "formats/calibration_checks.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/calibration_stores.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::expect_error;
using testing_support::header_of;
using testing_support::normed_header;
using testing_support::random_layer;
using testing_support::random_normed_layer;
using testing_support::some_sequences;
using testing_support::TempFolder;

// What no tokens can have given is refused, though its checksum is right.
TEST(CalibrationStore, NormalisedHeadsMustBePossible) {
  const TempFolder folder;
  const std::vector<std::pair<std::string, std::function<void(NormedHeadMoments&)>>> spoilt = {
      {"feature_moment is not symmetric", [](NormedHeadMoments& m) { m.feature_moment(0, 1) += 0.01; }},
      {"feature_mean is above", [](NormedHeadMoments& m) { m.feature_mean(4) = 100; }},
      {"query_moment has a negative diagonal", [](NormedHeadMoments& m) { m.query_moment(3, 0) = -1; }},
      {"query_mean is above", [](NormedHeadMoments& m) { m.query_mean(5) = -100; }},
      {"normed_cross has an entry above", [](NormedHeadMoments& m) { m.cross(11, 4) = 100; }},
  };
  for (const auto& [wrong, spoil] : spoilt) {
    SCOPED_TRACE(wrong);
    fs::remove(folder / "c.h5");
    std::mt19937 random(3);
    LayerMoments layer = random_normed_layer(random);
    spoil(*layer.normed_heads);
    CalibrationWriter writer(folder / "c.h5", normed_header(1), some_sequences());
    writer.add_layer(layer);
    writer.finish();
    const CalibrationFile file = CalibrationFile::open(folder / "c.h5");
    expect_error(ErrorKind::input, {"c.h5", "/layers/00000", wrong}, [&] { file.layer(0); });
  }
  CalibrationWriter writer(folder / "d.h5", normed_header(1), some_sequences());
  std::mt19937 random(3);
  EXPECT_THROW(writer.add_layer(random_layer(5, random)), std::invalid_argument);
  CalibrationWriter plain(folder / "e.h5", header_of(5, 1), some_sequences());
  EXPECT_THROW(plain.add_layer(random_normed_layer(random)), std::invalid_argument);
}

TEST(CalibrationFile, RefusesNumbersThatNoTokensHave) {
  const TempFolder folder;
  const std::vector<std::pair<std::function<void(LayerMoments&)>, std::string>> cases = {
      {[](LayerMoments& m) { m.second_moment(1, 3) += 1e-9; }, "symmetric"},
      {[](LayerMoments& m) { m.second_moment *= -1; }, "negative diagonal"},
      {[](LayerMoments& m) { m.second_moment(1, 3) = m.second_moment(3, 1) = 100; }, "diagonal allows"},
      {[](LayerMoments& m) { m.second_moment.setZero(); }, "mean is above"},
      {[](LayerMoments& m) { m.mean(2) = 10; }, "mean is above"},
      {[](LayerMoments& m) { m.received_moment(1, 3) += 1e-9; }, "received_moment is not symmetric"},
      {[](LayerMoments& m) { m.received_mean(2) = 10; }, "received_mean is above what received_moment"},
      {[](LayerMoments& m) { m.mass_square(0) = 1.01; }, "mass_square"},
      {[](LayerMoments& m) { m.mass_square(1) = 0; }, "mass_square"},
      {[](LayerMoments& m) { m.score_effect(1) = -1e-9; }, "score_effect has a negative"},
      {[](LayerMoments& m) { m.distance_mass *= 2; }, "no distribution"},
      {[](LayerMoments& m) {
         m.distance_mass(1, 2) -= 2;
         m.distance_mass(1, 3) += 2;
       },
       "no distribution"},
  };
  for (const auto& [spoil, wrong] : cases) {
    fs::remove(folder / "c.h5");
    std::mt19937 random(3);
    LayerMoments moments = random_layer(5, random);
    spoil(moments);
    CalibrationWriter writer(folder / "c.h5", header_of(5, 1), some_sequences());
    writer.add_layer(moments);
    writer.finish();
    const CalibrationFile file = CalibrationFile::open(folder / "c.h5");
    expect_error(ErrorKind::input, {"c.h5", "/layers/00000", wrong}, [&] { file.layer(0); });
  }
}

}  // namespace
}  // namespace relatent
