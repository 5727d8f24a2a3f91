#include "formats/calibration_store.h"

#include <gtest/gtest.h>
#include <hdf5.h>

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
using testing_support::kHeads;
using testing_support::kLength;
using testing_support::normed_header;
using testing_support::random_layer;
using testing_support::random_normed_layer;
using testing_support::read_bytes;
using testing_support::some_sequences;
using testing_support::TempFolder;
using testing_support::write_store;

void expect_same(const LayerMoments& found, const LayerMoments& expected) {
  EXPECT_EQ(found.tokens, expected.tokens);
  EXPECT_EQ(found.second_moment, expected.second_moment);
  EXPECT_EQ(found.mean, expected.mean);
  EXPECT_EQ(found.received_moment, expected.received_moment);
  EXPECT_EQ(found.received_mean, expected.received_mean);
  EXPECT_EQ(found.mass_square, expected.mass_square);
  EXPECT_EQ(found.score_effect, expected.score_effect);
  EXPECT_EQ(found.distance_mass, expected.distance_mass);
}

TEST(CalibrationStore, RoundTrips) {
  const TempFolder folder;
  // More rows than go through memory at once, and more layers than fit into a compact group.
  for (const auto& [hidden, layers] : {std::pair{5, 1}, std::pair{3, 20}, std::pair{600, 2}}) {
    const fs::path path = folder / "c.h5";
    const std::vector<LayerMoments> written = write_store(path, hidden, layers);
    CalibrationFile opened = CalibrationFile::open(path);
    CalibrationFile file = std::move(opened);
    EXPECT_EQ(file.path(), path);
    const CalibrationHeader expected = header_of(hidden, layers);
    EXPECT_EQ(file.header().source_fingerprint, expected.source_fingerprint);
    EXPECT_EQ(file.header().source_config, expected.source_config);
    EXPECT_EQ(file.header().model_type, expected.model_type);
    EXPECT_EQ(file.header().hidden_size, hidden);
    EXPECT_EQ(file.header().num_hidden_layers, layers);
    EXPECT_EQ(file.header().num_attention_heads, kHeads);
    EXPECT_EQ(file.header().compute, "bfloat16");
    const Sequences sequences = file.sequences();
    EXPECT_EQ(sequences.count, 3);
    EXPECT_EQ(sequences.length, kLength);
    EXPECT_EQ(sequences.tokens, some_sequences().tokens);
    for (std::int64_t i = layers; i-- > 0;) {
      expect_same(file.layer(i), written[static_cast<std::size_t>(i)]);
    }
    EXPECT_THROW(file.layer(layers), std::out_of_range);
    EXPECT_THROW(file.layer(-1), std::out_of_range);
  }
}

TEST(CalibrationStore, NormalisedHeadsGoAlong) {
  const TempFolder folder;
  std::mt19937 random(3);
  std::vector<LayerMoments> written;
  CalibrationWriter writer(folder / "c.h5", normed_header(2), some_sequences());
  for (int i = 0; i < 2; ++i) {
    written.push_back(random_normed_layer(random));
    writer.add_layer(written.back());
  }
  writer.finish();
  const CalibrationFile file = CalibrationFile::open(folder / "c.h5");
  EXPECT_EQ(file.header().num_key_value_heads, 2);
  EXPECT_EQ(file.header().head_dim, 3);
  for (std::size_t i = 0; i < 2; ++i) {
    const LayerMoments found = file.layer(static_cast<std::int64_t>(i));
    expect_same(found, written[i]);
    ASSERT_TRUE(found.normed_heads.has_value());
    const NormedHeadMoments& expected = *written[i].normed_heads;
    EXPECT_EQ(found.normed_heads->feature_moment, expected.feature_moment);
    EXPECT_EQ(found.normed_heads->feature_mean, expected.feature_mean);
    EXPECT_EQ(found.normed_heads->query_moment, expected.query_moment);
    EXPECT_EQ(found.normed_heads->query_mean, expected.query_mean);
    EXPECT_EQ(found.normed_heads->cross, expected.cross);
  }
}

TEST(CalibrationStore, KeepsLongAndEmptyTexts) {
  const TempFolder folder;
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, std::size_t{70'000}, std::size_t{3'000'000}}) {
    CalibrationHeader header = header_of(2, 1);
    header.source_config = std::string(size, 'x');
    std::mt19937 random(2);
    CalibrationWriter writer(folder / "c.h5", header, some_sequences());
    writer.add_layer(random_layer(2, random));
    writer.finish();
    EXPECT_EQ(CalibrationFile::open(folder / "c.h5").header().source_config, header.source_config);
  }
}

TEST(CalibrationStore, BytesAreAFunctionOfTheContents) {
  const TempFolder folder;
  write_store(folder / "a.h5", 5, 20);
  // Other contents in between, so that leftovers in memory would show.
  write_store(folder / "b.h5", 300, 3, 99);
  write_store(folder / "c.h5", 5, 20);
  EXPECT_TRUE(read_bytes(folder / "a.h5") == read_bytes(folder / "c.h5"));
}

TEST(CalibrationStore, LayoutIsAsDocumented) {
  const TempFolder folder;
  write_store(folder / "c.h5", 5, 2);
  const hid_t file = H5Fopen((folder / "c.h5").c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  ASSERT_GE(file, 0);
  for (const char* name : {"format", "format_version", "creator", "source_fingerprint", "source_config",
                           "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
                           "num_key_value_heads", "head_dim", "compute", "checksum"}) {
    EXPECT_GT(H5Aexists(file, name), 0) << name;
  }
  for (const char* name :
       {"/tokens", "/layers/00000/second_moment", "/layers/00001/mean", "/layers/00000/received_moment",
        "/layers/00001/received_mean", "/layers/00001/distance_mass", "/layers/00001/mass_square",
        "/layers/00001/score_effect"}) {
    EXPECT_GT(H5Aexists_by_name(file, name, "dimensions", H5P_DEFAULT), 0) << name;
    EXPECT_GT(H5Aexists_by_name(file, name, "unit", H5P_DEFAULT), 0) << name;
    H5O_info_t info{};
    ASSERT_GE(H5Oget_info_by_name(file, name, &info, H5P_DEFAULT), 0);
    EXPECT_EQ(info.ctime, 0) << name;
    EXPECT_EQ(info.mtime, 0) << name;
  }
  EXPECT_GT(H5Aexists_by_name(file, "/layers/00001", "tokens", H5P_DEFAULT), 0);
  const hid_t attribute =
      H5Aopen_by_name(file, "/layers/00000/distance_mass", "dimensions", H5P_DEFAULT, H5P_DEFAULT);
  const hid_t type = H5Aget_type(attribute);
  ASSERT_EQ(H5Tget_size(type), 8U);
  std::string packed(16, '\0');
  ASSERT_GE(H5Aread(attribute, type, packed.data()), 0);
  EXPECT_EQ(packed, std::string("head\0\0\0\0distance", 16));
  H5Tclose(type);
  H5Aclose(attribute);

  // Row-major: element [1][2] of a [hidden, hidden] matrix is the eighth of five by five.
  std::mt19937 random(1);
  const LayerMoments first = random_layer(5, random);
  const hid_t dataset = H5Dopen2(file, "/layers/00000/second_moment", H5P_DEFAULT);
  std::vector<double> values(25);
  ASSERT_GE(H5Dread(dataset, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()), 0);
  EXPECT_EQ(values[7], first.second_moment(1, 2));
  H5Dclose(dataset);
  H5Fclose(file);
}

TEST(CalibrationWriter, RefusesMisuse) {
  const TempFolder folder;
  const fs::path path = folder / "c.h5";
  const auto make = [&](const CalibrationHeader& header, const Sequences& sequences) {
    const CalibrationWriter writer(path, header, sequences);
  };
  EXPECT_THROW(make(header_of(0, 1), some_sequences()), std::invalid_argument);
  EXPECT_THROW(make(header_of(5, 0), some_sequences()), std::invalid_argument);
  Sequences short_of_one = some_sequences();
  short_of_one.tokens.pop_back();
  EXPECT_THROW(make(header_of(5, 1), short_of_one), std::invalid_argument);
  EXPECT_THROW(make(header_of(5, 1), {}), std::invalid_argument);

  std::mt19937 random(4);
  {
    CalibrationWriter writer(path, header_of(5, 1), some_sequences());
    const LayerMoments good = random_layer(5, random);
    const auto spoilt = [&good](const std::function<void(LayerMoments&)>& spoil) {
      LayerMoments moments = good;
      spoil(moments);
      return moments;
    };
    for (const LayerMoments& bad : {
             spoilt([](LayerMoments& m) { m.tokens = 0; }),
             spoilt([](LayerMoments& m) { m.second_moment.resize(5, 4); }),
             spoilt([](LayerMoments& m) { m.second_moment.resize(4, 5); }),
             spoilt([](LayerMoments& m) { m.mean.resize(6); }),
             spoilt([](LayerMoments& m) { m.received_moment.resize(4, 4); }),
             spoilt([](LayerMoments& m) { m.received_mean.resize(0); }),
             spoilt([](LayerMoments& m) { m.distance_mass.resize(kLength, kHeads); }),
             spoilt([](LayerMoments& m) { m.mass_square.resize(kHeads + 1); }),
             spoilt([](LayerMoments& m) { m.score_effect.resize(0); }),
         }) {
      EXPECT_THROW(writer.add_layer(bad), std::invalid_argument);
    }
    EXPECT_THROW(writer.finish(), std::logic_error);
    writer.add_layer(good);
    EXPECT_THROW(writer.add_layer(good), std::logic_error);
  }
  // Never finished: nothing is left.
  EXPECT_TRUE(fs::is_empty(folder.path()));
  expect_error(ErrorKind::machine, {"no/c.h5.partial", "cannot create"}, [&] {
    const CalibrationWriter writer(folder / "no/c.h5", header_of(5, 1), some_sequences());
  });
}

}  // namespace
}  // namespace relatent
