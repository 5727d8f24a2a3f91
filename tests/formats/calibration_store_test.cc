#include "formats/calibration_store.h"

#include <gtest/gtest.h>
#include <hdf5.h>

#include <filesystem>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"

// libhdf5 loses the memory of an object header whose checksum turns out wrong; nobody else could free it.
extern "C" const char*
__lsan_default_suppressions();  // NOLINT(bugprone-reserved-identifier): LeakSanitizer's name
extern "C" const char* __lsan_default_suppressions() {
  return "leak:libhdf5";
}  // NOLINT: as above

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::expect_error;
using testing_support::read_bytes;
using testing_support::TempFolder;

constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kLength = 7;

MatrixD random_matrix(Index rows, Index columns, std::mt19937& random) {
  std::normal_distribution<double> normal;
  return MatrixD::NullaryExpr(rows, columns, [&] { return normal(random); });
}

CalibrationHeader header_of(std::int64_t hidden, std::int64_t layers) {
  return {.source_fingerprint = "00112233445566778899aabbccddeeff",
          .source_config = "{\"model_type\": \"llama\", \"é\": 1}",
          .model_type = "llama",
          .hidden_size = hidden,
          .num_hidden_layers = layers,
          .num_attention_heads = kHeads,
          .compute = "bfloat16"};
}

Sequences some_sequences() {
  Sequences sequences{.count = 3, .length = kLength, .tokens = {}};
  for (int i = 0; i < 3 * kLength; ++i) {
    sequences.tokens.push_back(i * i);
  }
  return sequences;
}

LayerMoments random_layer(std::int64_t hidden, std::mt19937& random) {
  LayerMoments moments;
  moments.tokens = 21 + static_cast<std::int64_t>(random() % 100);
  const MatrixD x = random_matrix(hidden, 30, random);
  moments.second_moment = x * x.transpose() / 30;
  moments.second_moment.triangularView<Eigen::StrictlyUpper>() = moments.second_moment.transpose();
  moments.mean = x.rowwise().mean();
  moments.received_moment = moments.second_moment * 1.25;
  moments.received_mean = moments.mean * 0.5;
  moments.mass_square = random_matrix(kHeads, 1, random).cwiseAbs2().cwiseMin(0.9).array() + 0.01;
  moments.score_effect = random_matrix(kHeads, 1, random).cwiseAbs();
  moments.distance_mass = random_matrix(kHeads, kLength, random).cwiseAbs();
  moments.distance_mass.array().colwise() /= moments.distance_mass.rowwise().sum().array().eval();
  return moments;
}

std::vector<LayerMoments> write_store(const fs::path& path, std::int64_t hidden, std::int64_t layers,
                                      unsigned seed = 1) {
  fs::remove(path);
  std::mt19937 random(seed);
  std::vector<LayerMoments> all;
  CalibrationWriter writer(path, header_of(hidden, layers), some_sequences());
  for (std::int64_t i = 0; i < layers; ++i) {
    all.push_back(random_layer(hidden, random));
    writer.add_layer(all.back());
  }
  EXPECT_FALSE(fs::exists(path));
  writer.finish();
  return all;
}

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

// Of a model with two key/value heads of three numbers.
CalibrationHeader normed_header(std::int64_t layers) {
  CalibrationHeader out = header_of(5, layers);
  out.num_key_value_heads = 2;
  out.head_dim = 3;
  return out;
}

LayerMoments random_normed_layer(std::mt19937& random) {
  LayerMoments out = random_layer(5, random);
  const auto second = [](const MatrixD& rows) {
    MatrixD moment = rows * rows.transpose() / 30;
    moment.triangularView<Eigen::StrictlyUpper>() = moment.transpose();
    return moment;
  };
  const MatrixD features = random_matrix(12, 30, random);
  const MatrixD queries = random_matrix(kHeads * 3, 30, random);
  NormedHeadMoments& heads = out.normed_heads.emplace();
  heads.feature_moment = second(features);
  heads.feature_mean = features.rowwise().mean();
  heads.query_moment.resize(kHeads * 3, 3);
  for (Index h = 0; h < kHeads; ++h) {
    heads.query_moment.middleRows(h * 3, 3) = second(queries.middleRows(h * 3, 3));
  }
  heads.query_mean = queries.rowwise().mean();
  heads.cross = random_matrix(kHeads * 3 + 6, 5, random) * 0.01;
  return out;
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

TEST(CalibrationFile, RefusesOtherFiles) {
  const TempFolder folder;
  expect_error(ErrorKind::input, {"missing.h5", "cannot open"},
               [&] { CalibrationFile::open(folder / "missing.h5"); });
  expect_error(ErrorKind::input, {"expected a regular file"}, [&] { CalibrationFile::open(folder.path()); });
  expect_error(ErrorKind::input, {"a.h5", "not a calibration store", "an HDF5 file"},
               [&] { CalibrationFile::open(folder.write("a.h5", "")); });
  expect_error(ErrorKind::input, {"a.h5", "an HDF5 file"},
               [&] { CalibrationFile::open(folder.write("a.h5", R"({"not": "hdf5"})")); });
}

// Changes a good store through the HDF5 library and expects a complaint when it is opened.
struct Damage {
  std::string name;
  std::function<void(hid_t)> damage;
  std::vector<std::string> parts;
};

void set_number(hid_t file, const char* name, std::int64_t value) {
  const hid_t attribute = H5Aopen(file, name, H5P_DEFAULT);
  EXPECT_GE(H5Awrite(attribute, H5T_NATIVE_INT64, &value), 0);
  H5Aclose(attribute);
}

void replace_dataset(hid_t file, const char* name, hid_t type, const std::vector<hsize_t>& shape,
                     hid_t properties = H5P_DEFAULT) {
  EXPECT_GE(H5Ldelete(file, name, H5P_DEFAULT), 0);
  const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr);
  const hid_t dataset = H5Dcreate2(file, name, type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
  EXPECT_GE(dataset, 0);
  const std::vector<double> zeros(1000);
  H5Dwrite(dataset, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros.data());
  H5Dclose(dataset);
  H5Sclose(space);
}

void replace_text(hid_t file, const char* name, const std::string& text, bool variable) {
  H5Adelete(file, name);
  const hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, variable ? H5T_VARIABLE : text.size());
  const hid_t space = H5Screate(H5S_SCALAR);
  const hid_t attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  const char* pointer = text.c_str();
  H5Awrite(attribute, type, variable ? static_cast<const void*>(&pointer) : pointer);
  H5Aclose(attribute);
  H5Sclose(space);
  H5Tclose(type);
}

void expect_refused(const std::vector<Damage>& damages) {
  const TempFolder folder;
  for (const Damage& test : damages) {
    SCOPED_TRACE(test.name);
    write_store(folder / "c.h5", 5, 2);
    const hid_t file = H5Fopen((folder / "c.h5").c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    ASSERT_GE(file, 0);
    test.damage(file);
    ASSERT_GE(H5Fclose(file), 0);
    std::vector<std::string> parts = test.parts;
    parts.emplace_back("c.h5: ");
    expect_error(ErrorKind::input, parts, [&] { CalibrationFile::open(folder / "c.h5"); });
  }
}

TEST(CalibrationFile, RefusesMetadataWithoutChecksums) {
  const TempFolder folder;
  const fs::path path = folder / "c.h5";
  H5Fclose(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT));
  expect_error(ErrorKind::input, {"c.h5", "checksums", "an older format"},
               [&] { CalibrationFile::open(path); });
}

TEST(CalibrationFile, RefusesBadAttributes) {
  expect_refused({
      {"no format", [](hid_t file) { H5Adelete(file, "format"); }, {"attribute format", "found nothing"}},
      {"another format",
       [](hid_t file) { replace_text(file, "format", "something-else", false); },
       {"format", "expected relatent-calibration", "found something-else"}},
      {"variable text",
       [](hid_t file) { replace_text(file, "format", "relatent-calibration", true); },
       {"attribute format", "fixed-length text"}},
      {"newer",
       [](hid_t file) { set_number(file, "format_version", 6); },
       {"format_version", "newer", "found 6"}},
      {"earlier",
       [](hid_t file) { set_number(file, "format_version", 4); },
       {"format_version", "earlier", "calibrate` again", "found 4"}},
      {"version 0",
       [](hid_t file) { set_number(file, "format_version", 0); },
       {"format_version", "at least 1"}},
      {"no hidden", [](hid_t file) { set_number(file, "hidden_size", 0); }, {"hidden_size", "found 0"}},
      {"negative",
       [](hid_t file) { set_number(file, "num_hidden_layers", -4); },
       {"num_hidden_layers", "found -4"}},
      {"text for number",
       [](hid_t file) { replace_text(file, "hidden_size", "5", false); },
       {"attribute hidden_size", "an integer"}},
      {"no config", [](hid_t file) { H5Adelete(file, "source_config"); }, {"attribute source_config"}},
  });
}

TEST(CalibrationFile, RefusesStoresThatDoNotFitTheirHeader) {
  expect_refused({
      {"too many layers",
       [](hid_t file) { set_number(file, "num_hidden_layers", std::numeric_limits<std::int64_t>::max()); },
       {"/layers/00002", "found nothing"}},
      {"other hidden size",
       [](hid_t file) { set_number(file, "hidden_size", 6); },
       {"/layers/00000/second_moment", "expected [6, 6]", "found [5, 5]"}},
      {"overflowing hidden size",
       [](hid_t file) { set_number(file, "hidden_size", std::numeric_limits<std::int64_t>::max()); },
       {"/layers/00000/second_moment", "found [5, 5]"}},
      {"other heads",
       [](hid_t file) { set_number(file, "num_attention_heads", 3); },
       {"/layers/00000/distance_mass", "expected [3, 7]", "found [2, 7]"}},
  });
}

TEST(CalibrationFile, RefusesMembersOfAnotherKind) {
  expect_refused({
      {"no tokens", [](hid_t file) { H5Ldelete(file, "tokens", H5P_DEFAULT); }, {"/tokens", "found nothing"}},
      {"flat tokens",
       [](hid_t file) { replace_dataset(file, "tokens", H5T_STD_I32LE, {21}); },
       {"/tokens", "[sequences, length]", "found [21]"}},
      {"wide tokens",
       [](hid_t file) {
         replace_dataset(file, "tokens", H5T_STD_I64LE, {3, 7});
       },
       {"/tokens", "int32"}},
      {"no layer",
       [](hid_t file) { H5Ldelete(file, "layers/00001", H5P_DEFAULT); },
       {"/layers/00001", "found nothing"}},
      {"no layer tokens",
       [](hid_t file) { H5Adelete_by_name(file, "layers/00001", "tokens", H5P_DEFAULT); },
       {"attribute tokens"}},
      {"no mean",
       [](hid_t file) { H5Ldelete(file, "layers/00001/mean", H5P_DEFAULT); },
       {"/layers/00001/mean", "found nothing"}},
      {"mean of other shape",
       [](hid_t file) { replace_dataset(file, "layers/00001/mean", H5T_IEEE_F64LE, {4}); },
       {"/layers/00001/mean", "expected [5]", "found [4]"}},
      {"narrow mean",
       [](hid_t file) { replace_dataset(file, "layers/00001/mean", H5T_IEEE_F32LE, {5}); },
       {"/layers/00001/mean", "float64", "another type"}},
      {"big-endian mean",
       [](hid_t file) { replace_dataset(file, "layers/00001/mean", H5T_IEEE_F64BE, {5}); },
       {"/layers/00001/mean", "little-endian"}},
      {"group for dataset",
       [](hid_t file) {
         H5Ldelete(file, "layers/00001/mean", H5P_DEFAULT);
         H5Gclose(H5Gcreate2(file, "layers/00001/mean", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
       },
       {"/layers/00001/mean", "a dataset"}},
      {"dataset for group",
       [](hid_t file) { replace_dataset(file, "layers", H5T_IEEE_F64LE, {5}); },
       {"/layers", "a group"}},
      {"soft link",
       [](hid_t file) {
         H5Ldelete(file, "layers/00001/mean", H5P_DEFAULT);
         H5Lcreate_soft("/layers/00000/mean", file, "layers/00001/mean", H5P_DEFAULT, H5P_DEFAULT);
       },
       {"/layers/00001/mean", "found a link"}},
      {"external link",
       [](hid_t file) {
         H5Ldelete(file, "layers", H5P_DEFAULT);
         H5Lcreate_external("other.h5", "/layers", file, "layers", H5P_DEFAULT, H5P_DEFAULT);
       },
       {"/layers", "found a link"}},
  });
}

// Every dataset is what its own checksum says; what was written as a whole is not.
TEST(CalibrationFile, RefusesWhatWasNotWrittenTogether) {
  const auto swap = [](hid_t file, const std::string& a, const std::string& b) {
    H5Lmove(file, a.c_str(), file, "aside", H5P_DEFAULT, H5P_DEFAULT);
    H5Lmove(file, b.c_str(), file, a.c_str(), H5P_DEFAULT, H5P_DEFAULT);
    H5Lmove(file, "aside", file, b.c_str(), H5P_DEFAULT, H5P_DEFAULT);
  };
  expect_refused({
      {"layers swapped",
       [&](hid_t file) { swap(file, "layers/00000", "layers/00001"); },
       {"written together", "checksum"}},
      {"means swapped",
       [&](hid_t file) { swap(file, "layers/00000/mean", "layers/00001/mean"); },
       {"written together"}},
      {"one object for two layers",
       [](hid_t file) {
         H5Ldelete(file, "layers/00001/mean", H5P_DEFAULT);
         H5Lcreate_hard(file, "layers/00000/mean", file, "layers/00001/mean", H5P_DEFAULT, H5P_DEFAULT);
       },
       {"written together"}},
      {"another type of products",
       [](hid_t file) { replace_text(file, "compute", "float32", false); },
       {"written together"}},
      {"no checksum", [](hid_t file) { H5Adelete(file, "checksum"); }, {"attribute checksum"}},
  });
}

TEST(CalibrationFile, RefusesDatasetsWhoseBytesLieElsewhere) {
  constexpr hsize_t kHuge = hsize_t{1} << 40U;
  expect_refused({
      {"compact storage",
       [](hid_t file) {
         const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
         H5Pset_layout(properties, H5D_COMPACT);
         replace_dataset(file, "layers/00001/mean", H5T_IEEE_F64LE, {5}, properties);
         H5Pclose(properties);
       },
       {"/layers/00001/mean", "contiguous"}},
      {"shape without bytes",
       [](hid_t file) {
         set_number(file, "hidden_size", static_cast<std::int64_t>(kHuge));
         H5Ldelete(file, "layers/00000/second_moment", H5P_DEFAULT);
         const std::vector<hsize_t> shape = {kHuge, kHuge};
         const hid_t properties = H5Pcreate(H5P_DATASET_CREATE);
         const std::vector<hsize_t> chunk = {8, 8};
         H5Pset_chunk(properties, 2, chunk.data());
         const hid_t space = H5Screate_simple(2, shape.data(), nullptr);
         H5Dclose(H5Dcreate2(file, "layers/00000/second_moment", H5T_IEEE_F64LE, space, H5P_DEFAULT,
                             properties, H5P_DEFAULT));
         H5Sclose(space);
         H5Pclose(properties);
       },
       {"/layers/00000/second_moment", "contiguous"}},
      {"more bytes than the file",
       [](hid_t file) {
         H5Ldelete(file, "tokens", H5P_DEFAULT);
         const std::vector<hsize_t> shape = {3, kHuge};
         const hid_t space = H5Screate_simple(2, shape.data(), nullptr);
         H5Dclose(H5Dcreate2(file, "tokens", H5T_STD_I32LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
         H5Sclose(space);
       },
       {"/tokens", "as many stored bytes"}},
  });
}

TEST(CalibrationFile, RefusesValuesThatAreNoMoments) {
  const TempFolder folder;
  const auto spoil = [&](const char* name, hid_t type, const void* values) {
    write_store(folder / "c.h5", 5, 2);
    const hid_t file = H5Fopen((folder / "c.h5").c_str(), H5F_ACC_RDWR, H5P_DEFAULT);
    const hid_t dataset = H5Dopen2(file, name, H5P_DEFAULT);
    EXPECT_GE(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values), 0);
    H5Dclose(dataset);
    H5Fclose(file);
    return CalibrationFile::open(folder / "c.h5");
  };
  std::vector<double> values(25, 1.0);
  values[4] = std::numeric_limits<double>::quiet_NaN();
  for (const char* name :
       {"/layers/00001/second_moment", "/layers/00001/mean", "/layers/00001/distance_mass"}) {
    const CalibrationFile file = spoil(name, H5T_NATIVE_DOUBLE, values.data());
    EXPECT_NO_THROW(file.layer(0));
    expect_error(ErrorKind::input, {"c.h5", name, "finite"}, [&] { file.layer(1); });
  }
  std::vector<std::int32_t> tokens(21, 1);
  tokens[20] = -3;
  const CalibrationFile file = spoil("/tokens", H5T_NATIVE_INT32, tokens.data());
  expect_error(ErrorKind::input, {"/tokens", "found -3"}, [&] { static_cast<void>(file.sequences()); });
  // Numbers that could be moments, but are not those that were written.
  std::fill(values.begin(), values.end(), 0.0);
  for (const char* name :
       {"/layers/00001/second_moment", "/layers/00001/mean", "/layers/00001/distance_mass"}) {
    const CalibrationFile changed = spoil(name, H5T_NATIVE_DOUBLE, values.data());
    expect_error(ErrorKind::input, {"c.h5", name, "damaged", "checksum"}, [&] { changed.layer(1); });
  }
  tokens[20] = 3;
  const CalibrationFile changed = spoil("/tokens", H5T_NATIVE_INT32, tokens.data());
  expect_error(ErrorKind::input, {"/tokens", "damaged"}, [&] { static_cast<void>(changed.sequences()); });
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

void read_everything(const fs::path& path) {
  const CalibrationFile file = CalibrationFile::open(path);
  static_cast<void>(file.sequences());
  for (std::int64_t i = 0; i < file.header().num_hidden_layers; ++i) {
    static_cast<void>(file.layer(i));
  }
}

TEST(CalibrationFile, RefusesEveryCut) {
  const TempFolder folder;
  write_store(folder / "good.h5", 5, 2);
  const std::string bytes = read_bytes(folder / "good.h5");
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    expect_error(ErrorKind::input, {"c.h5: "},
                 [&] { read_everything(folder.write("c.h5", bytes.substr(0, size))); });
  }
}

TEST(CalibrationFile, SurvivesEveryFlippedByte) {
  const TempFolder folder;
  write_store(folder / "good.h5", 5, 2);
  const std::string bytes = read_bytes(folder / "good.h5");
  std::mt19937 random(8);
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    std::string damaged = bytes;
    damaged[at] = static_cast<char>(static_cast<unsigned char>(damaged[at]) ^ (1 + random() % 255));
    try {
      read_everything(folder.write("c.h5", damaged));
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::input);
    }
  }
}

}  // namespace
}  // namespace relatent
