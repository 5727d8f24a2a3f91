#include "formats/hdf5.h"

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <optional>
#include <span>

#include "formats/error.h"
#include "formats/tensor_file.h"

namespace relatent::hdf5 {
namespace {

constexpr std::size_t kLongestText = std::size_t{64} << 20U;

std::recursive_mutex& library_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

// Bytes of a dense array, or nothing when the product does not fit.
std::optional<std::uint64_t> dense_bytes(std::span<const std::int64_t> shape, std::uint64_t item_bytes) {
  std::uint64_t product = item_bytes;
  for (const std::int64_t dimension : shape) {
    if (dimension < 0 || __builtin_mul_overflow(product, static_cast<std::uint64_t>(dimension), &product)) {
      return std::nullopt;
    }
  }
  return product;
}

Handle text_type(std::size_t size) {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  if (H5Tset_size(type.get(), std::max<std::size_t>(size, 1)) < 0 ||
      H5Tset_strpad(type.get(), H5T_STR_NULLPAD) < 0 || H5Tset_cset(type.get(), H5T_CSET_UTF8) < 0) {
    return {};
  }
  return type;
}

// Calls move(memory_space, file_space, first_row, rows) for bands of rows, so that a row-major copy of a
// large column-major matrix never exists whole.
bool for_bands(hid_t dataset, std::int64_t rows, std::int64_t columns,
               const std::function<bool(hid_t, hid_t, std::int64_t, std::int64_t)>& move) {
  constexpr std::int64_t kBand = 256;
  for (std::int64_t first = 0; first < rows; first += kBand) {
    const std::int64_t band = std::min(kBand, rows - first);
    const std::array<hsize_t, 2> start{static_cast<hsize_t>(first), 0};
    const std::array<hsize_t, 2> count{static_cast<hsize_t>(band), static_cast<hsize_t>(columns)};
    const Handle file_space(H5Dget_space(dataset), H5Sclose);
    const Handle memory_space(H5Screate_simple(2, count.data(), nullptr), H5Sclose);
    if (!file_space.valid() || !memory_space.valid() ||
        H5Sselect_hyperslab(file_space.get(), H5S_SELECT_SET, start.data(), nullptr, count.data(), nullptr) <
            0 ||
        !move(memory_space.get(), file_space.get(), first, band)) {
      return false;
    }
  }
  return true;
}

using RowMajorD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

}  // namespace

LibraryLock::LibraryLock() : lock_(library_mutex()) {
  // After a write that failed on a full disk the library crashes when it cleans up at exit; nothing of ours
  // is left for it to clean.
  [[maybe_unused]] static const herr_t no_cleanup = H5dont_atexit();
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // it would print to stderr by itself
}

void Writing::require(bool done, const std::string& what) const {
  if (!done) {
    throw Error(ErrorKind::machine, to_sentence({.file = path_, .problem = "cannot write " + what}));
  }
}

Handle Writing::create_file() const {
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  require(H5Pset_obj_track_times(creation.get(), false) >= 0 &&
              H5Pset_libver_bounds(access.get(), H5F_LIBVER_V18, H5F_LIBVER_V18) >= 0 &&
              H5Pset_file_locking(access.get(), false, true) >= 0 &&
              H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG) >= 0,
          "an HDF5 file with these settings");
  Handle file(H5Fcreate(path_.c_str(), H5F_ACC_TRUNC, creation.get(), access.get()), H5Fclose);
  require(file.valid(), "an HDF5 file");
  return file;
}

Handle Writing::add_group(hid_t parent, const std::string& name) const {
  const Handle properties(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
  require(H5Pset_obj_track_times(properties.get(), false) >= 0, "the group " + name);
  Handle group(H5Gcreate2(parent, name.c_str(), H5P_DEFAULT, properties.get(), H5P_DEFAULT), H5Gclose);
  require(group.valid(), "the group " + name);
  return group;
}

Handle Writing::add_dataset(hid_t parent, const std::string& name, const DatasetShape& shape,
                            const std::vector<std::string_view>& dimensions, std::string_view unit) const {
  const std::vector<hsize_t> extent(shape.dimensions.begin(), shape.dimensions.end());
  const Handle space(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr), H5Sclose);
  const Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  require(H5Pset_obj_track_times(properties.get(), false) >= 0 &&
              H5Pset_layout(properties.get(), H5D_CONTIGUOUS) >= 0 &&
              H5Pset_alloc_time(properties.get(), H5D_ALLOC_TIME_EARLY) >= 0 &&
              H5Pset_fill_time(properties.get(), H5D_FILL_TIME_NEVER) >= 0,
          "the dataset " + name);
  Handle dataset(
      H5Dcreate2(parent, name.c_str(), shape.type, space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT),
      H5Dclose);
  require(dataset.valid(), "the dataset " + name);
  add_text_list(dataset.get(), "dimensions", dimensions);
  add_text(dataset.get(), "unit", unit);
  return dataset;
}

void Writing::add_text(hid_t owner, const std::string& name, std::string_view text) const {
  std::string padded(text);
  padded.resize(std::max<std::size_t>(text.size(), 1), '\0');
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  add_attribute(owner, name, text_type(text.size()), space, padded.data());
}

void Writing::add_text_list(hid_t owner, const std::string& name,
                            const std::vector<std::string_view>& texts) const {
  std::size_t width = 1;
  for (const std::string_view text : texts) {
    width = std::max(width, text.size());
  }
  std::string packed;
  for (const std::string_view text : texts) {
    packed += text;
    packed.append(width - text.size(), '\0');
  }
  const hsize_t count = texts.size();
  const Handle space(H5Screate_simple(1, &count, nullptr), H5Sclose);
  add_attribute(owner, name, text_type(width), space, packed.data());
}

void Writing::add_number(hid_t owner, const std::string& name, std::int64_t number) const {
  const Handle type(H5Tcopy(H5T_STD_I64LE), H5Tclose);
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  add_attribute(owner, name, type, space, &number);
}

void Writing::add_attribute(hid_t owner, const std::string& name, const Handle& type, const Handle& space,
                            const void* value) const {
  const Handle attribute(H5Acreate2(owner, name.c_str(), type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT),
                         H5Aclose);
  require(attribute.valid() && H5Awrite(attribute.get(), type.get(), value) >= 0, "the attribute " + name);
}

void Reading::fail(const std::string& problem, const std::string& expected, const std::string& found) const {
  fail_input({.file = path_, .problem = problem, .expected = expected, .found = found});
}

Handle Reading::open_file() const {
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_file_locking(access.get(), false, true);
  H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
  Handle file(H5Fopen(path_.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
  if (!file.valid()) {
    fail("the HDF5 file is truncated or damaged", "", "");
  }
  return file;
}

Handle Reading::group(hid_t parent, const std::string& name, const std::string& full_name) const {
  require_member(parent, name, full_name);
  Handle opened(H5Gopen2(parent, name.c_str(), H5P_DEFAULT), H5Gclose);
  if (!opened.valid()) {
    fail(full_name, "a group", "something else");
  }
  return opened;
}

Handle Reading::dataset(hid_t parent, const std::string& name, const std::string& full_name) const {
  require_member(parent, name, full_name);
  Handle opened(H5Dopen2(parent, name.c_str(), H5P_DEFAULT), H5Dclose);
  if (!opened.valid()) {
    fail("dataset " + full_name, "a dataset", "something else");
  }
  return opened;
}

Handle Reading::dataset(hid_t parent, const std::string& name, const std::string& full_name,
                        const DatasetShape& shape) const {
  Handle opened = dataset(parent, name, full_name);
  const std::string what = "dataset " + full_name;
  const std::vector<std::int64_t> found = dimensions(opened, what);
  if (found != shape.dimensions) {
    fail(what, shape_text(shape.dimensions), shape_text(found));
  }
  const Handle type(H5Dget_type(opened.get()), H5Tclose);
  if (!type.valid() || H5Tequal(type.get(), shape.type) <= 0) {
    fail(what, std::string(shape.type_text) + " elements, little-endian", "another type");
  }
  const Handle properties(H5Dget_create_plist(opened.get()), H5Pclose);
  if (!properties.valid() || H5Pget_layout(properties.get()) != H5D_CONTIGUOUS ||
      H5Pget_external_count(properties.get()) != 0) {
    fail(what, "contiguous storage inside the file", "another layout");
  }
  const std::optional<std::uint64_t> bytes = dense_bytes(found, H5Tget_size(type.get()));
  const std::uint64_t stored = H5Dget_storage_size(opened.get());
  if (!bytes || *bytes > file_bytes_ || stored != *bytes) {
    fail(what, "as many stored bytes as its shape needs", std::to_string(stored));
  }
  return opened;
}

std::vector<std::int64_t> Reading::dimensions(const Handle& opened, const std::string& what) const {
  const Handle space(H5Dget_space(opened.get()), H5Sclose);
  const int rank = space.valid() ? H5Sget_simple_extent_ndims(space.get()) : -1;
  std::array<hsize_t, H5S_MAX_RANK> extent{};
  if (rank < 0 || rank > H5S_MAX_RANK ||
      H5Sget_simple_extent_dims(space.get(), extent.data(), nullptr) != rank) {
    fail(what, "an array", "something else");
  }
  std::vector<std::int64_t> found;
  for (int i = 0; i < rank; ++i) {
    const hsize_t dimension = extent.at(static_cast<std::size_t>(i));
    if (dimension > static_cast<hsize_t>(std::numeric_limits<std::int64_t>::max())) {
      fail(what, "dimensions below 2^63", std::to_string(dimension));
    }
    found.push_back(static_cast<std::int64_t>(dimension));
  }
  return found;
}

std::string Reading::text(hid_t owner, const std::string& name) const {
  const Attribute opened = attribute(owner, name);
  if (H5Tget_class(opened.type.get()) != H5T_STRING || H5Tis_variable_str(opened.type.get()) != 0) {
    fail("attribute " + name, "fixed-length text", "another type");
  }
  const std::size_t size = H5Tget_size(opened.type.get());
  if (size == 0 || size > kLongestText || size > file_bytes_) {
    fail("attribute " + name,
         "at most " + std::to_string(std::min<std::uint64_t>(kLongestText, file_bytes_)) + " bytes of text",
         std::to_string(size));
  }
  std::string value(size, '\0');
  if (H5Aread(opened.attribute.get(), opened.type.get(), value.data()) < 0) {
    fail("attribute " + name, "text", "unreadable bytes");
  }
  value.erase(value.find_last_not_of('\0') + 1);
  return value;
}

std::int64_t Reading::number(hid_t owner, const std::string& name, std::int64_t least) const {
  const Attribute opened = attribute(owner, name);
  if (H5Tget_class(opened.type.get()) != H5T_INTEGER ||
      H5Tget_size(opened.type.get()) > sizeof(std::int64_t)) {
    fail("attribute " + name, "an integer", "another type");
  }
  std::int64_t value = 0;
  if (H5Aread(opened.attribute.get(), H5T_NATIVE_INT64, &value) < 0) {
    fail("attribute " + name, "an integer", "unreadable bytes");
  }
  if (value < least) {
    fail("attribute " + name, "at least " + std::to_string(least), std::to_string(value));
  }
  return value;
}

// Hard links only: others may lead out of the file.
void Reading::require_member(hid_t parent, const std::string& name, const std::string& full_name) const {
  H5L_info_t info{};
  if (H5Lget_info(parent, name.c_str(), &info, H5P_DEFAULT) < 0) {
    fail(full_name, "a member of the file", "nothing");
  }
  if (info.type != H5L_TYPE_HARD) {
    fail(full_name, "a member of the file", "a link");
  }
}

Reading::Attribute Reading::attribute(hid_t owner, const std::string& name) const {
  if (H5Aexists(owner, name.c_str()) <= 0) {
    fail("attribute " + name, "a value", "nothing");
  }
  Attribute opened{Handle(H5Aopen(owner, name.c_str(), H5P_DEFAULT), H5Aclose), {}};
  if (opened.attribute.valid()) {
    opened.type = Handle(H5Aget_type(opened.attribute.get()), H5Tclose);
  }
  const Handle space(opened.attribute.valid() ? H5Aget_space(opened.attribute.get()) : H5I_INVALID_HID,
                     H5Sclose);
  if (!opened.type.valid() || !space.valid() || H5Sget_simple_extent_npoints(space.get()) != 1) {
    fail("attribute " + name, "a single value", "something else");
  }
  return opened;
}

bool write_matrix(hid_t dataset, const MatrixD& matrix) {
  return for_bands(dataset, matrix.rows(), matrix.cols(),
                   [&](hid_t memory_space, hid_t file_space, std::int64_t first, std::int64_t rows) {
                     const RowMajorD band = matrix.middleRows(first, rows);
                     return H5Dwrite(dataset, H5T_NATIVE_DOUBLE, memory_space, file_space, H5P_DEFAULT,
                                     band.data()) >= 0;
                   });
}

bool read_matrix(hid_t dataset, MatrixD& matrix) {
  return for_bands(
      dataset, matrix.rows(), matrix.cols(),
      [&](hid_t memory_space, hid_t file_space, std::int64_t first, std::int64_t rows) {
        RowMajorD band(rows, matrix.cols());
        if (H5Dread(dataset, H5T_NATIVE_DOUBLE, memory_space, file_space, H5P_DEFAULT, band.data()) < 0) {
          return false;
        }
        matrix.middleRows(first, rows) = band;
        return true;
      });
}

}  // namespace relatent::hdf5
