#include <gtest/gtest.h>
#include <hdf5.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "formats/calibration_store.h"
#include "tests/support/calibration_stores.h"
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
using testing_support::write_store;

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
