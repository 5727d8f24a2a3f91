#include "formats/calibration_store.h"

#include <hdf5.h>

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "formats/error.h"
#include "formats/files.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

constexpr std::string_view kFormat = "relatent-calibration";
constexpr std::int64_t kFormatVersion = 1;
constexpr std::string_view kCreator = "relatent " RELATENT_VERSION;
constexpr std::size_t kLongestText = std::size_t{64} << 20U;

// The library keeps global state; recursive because a constructor that throws destroys under the lock.
std::recursive_mutex& library_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

// Held around everything that calls the library.
class LibraryLock {
 public:
  LibraryLock() : lock_(library_mutex()) {
    // After a write that failed on a full disk the library crashes when it cleans up at exit; nothing of ours
    // is left for it to clean.
    [[maybe_unused]] static const herr_t no_cleanup = H5dont_atexit();
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // it would print to stderr by itself
  }

 private:
  std::scoped_lock<std::recursive_mutex> lock_;
};

class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Close closer) : id_(id), close_(closer) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, H5I_INVALID_HID)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  ~Handle() { static_cast<void>(close()); }

  hid_t get() const { return id_; }
  bool valid() const { return id_ >= 0; }
  // False when closing failed, as it does when buffered bytes cannot be written.
  bool close() {
    const hid_t id = std::exchange(id_, H5I_INVALID_HID);
    return id < 0 || close_(id) >= 0;
  }

 private:
  hid_t id_ = H5I_INVALID_HID;
  Close close_ = nullptr;
};

std::string layer_name(std::int64_t layer_idx) {
  std::string digits = std::to_string(layer_idx);
  digits.insert(0, digits.size() < 5 ? 5 - digits.size() : 0, '0');
  return digits;
}

std::string layer_path(std::int64_t layer_idx) {
  return "/layers/" + layer_name(layer_idx);
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

std::string dimensions_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

// What a dataset looks like on disk.
struct DatasetShape {
  hid_t type;  // in the file
  std::string_view type_text;
  std::vector<std::int64_t> dimensions;
};

DatasetShape tokens_shape(std::int64_t count, std::int64_t length) {
  return {H5T_STD_I32LE, "int32", {count, length}};
}

struct LayerShapes {
  DatasetShape second_moment;
  DatasetShape mean;
  DatasetShape distance_mass;
};

LayerShapes layer_shapes(const CalibrationHeader& header, std::int64_t length) {
  return {{H5T_IEEE_F64LE, "float64", {header.hidden_size, header.hidden_size}},
          {H5T_IEEE_F64LE, "float64", {header.hidden_size}},
          {H5T_IEEE_F64LE, "float64", {header.num_attention_heads, length}}};
}

Handle text_type(std::size_t size) {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  if (H5Tset_size(type.get(), std::max<std::size_t>(size, 1)) < 0 ||
      H5Tset_strpad(type.get(), H5T_STR_NULLPAD) < 0 || H5Tset_cset(type.get(), H5T_CSET_UTF8) < 0) {
    return {};
  }
  return type;
}

// Writing: every call of the library may meet a full disk.
class Writing {
 public:
  explicit Writing(std::filesystem::path path) : path_(std::move(path)) {}

  void require(bool done, const std::string& what) const {
    if (!done) {
      throw Error(ErrorKind::machine, to_sentence({.file = path_, .problem = "cannot write " + what}));
    }
  }

  void add_attribute(hid_t owner, const std::string& name, const Handle& type, const Handle& space,
                     const void* value) const {
    const Handle attribute(H5Acreate2(owner, name.c_str(), type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT),
                           H5Aclose);
    require(attribute.valid() && H5Awrite(attribute.get(), type.get(), value) >= 0, "the attribute " + name);
  }

  void add_text(hid_t owner, const std::string& name, std::string_view text) const {
    std::string padded(text);
    padded.resize(std::max<std::size_t>(text.size(), 1), '\0');
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    add_attribute(owner, name, text_type(text.size()), space, padded.data());
  }

  void add_number(hid_t owner, const std::string& name, std::int64_t number) const {
    const Handle type(H5Tcopy(H5T_STD_I64LE), H5Tclose);
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    add_attribute(owner, name, type, space, &number);
  }

  void add_text_list(hid_t owner, const std::string& name, const std::vector<std::string_view>& texts) const {
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

  Handle add_group(hid_t parent, const std::string& name) const {
    const Handle properties(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
    require(H5Pset_obj_track_times(properties.get(), false) >= 0, "the group " + name);
    Handle group(H5Gcreate2(parent, name.c_str(), H5P_DEFAULT, properties.get(), H5P_DEFAULT), H5Gclose);
    require(group.valid(), "the group " + name);
    return group;
  }

  Handle add_dataset(hid_t parent, const std::string& name, const DatasetShape& shape,
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

 private:
  std::filesystem::path path_;
};

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

// Reading: nothing is believed before it has been compared with the size of the file.
class Reading {
 public:
  Reading(std::filesystem::path path, std::uint64_t file_bytes)
      : path_(std::move(path)), file_bytes_(file_bytes) {}

  [[noreturn]] void fail(const std::string& problem, const std::string& expected,
                         const std::string& found) const {
    fail_input({.file = path_, .problem = problem, .expected = expected, .found = found});
  }

  // Hard links only: others may lead out of the file.
  void require_member(hid_t parent, const std::string& name, const std::string& full_name) const {
    H5L_info_t info{};
    if (H5Lget_info(parent, name.c_str(), &info, H5P_DEFAULT) < 0) {
      fail(full_name, "a member of the file", "nothing");
    }
    if (info.type != H5L_TYPE_HARD) {
      fail(full_name, "a member of the file", "a link");
    }
  }

  Handle group(hid_t parent, const std::string& name, const std::string& full_name) const {
    require_member(parent, name, full_name);
    Handle opened(H5Gopen2(parent, name.c_str(), H5P_DEFAULT), H5Gclose);
    if (!opened.valid()) {
      fail(full_name, "a group", "something else");
    }
    return opened;
  }

  Handle dataset(hid_t parent, const std::string& name, const std::string& full_name) const {
    require_member(parent, name, full_name);
    Handle opened(H5Dopen2(parent, name.c_str(), H5P_DEFAULT), H5Dclose);
    if (!opened.valid()) {
      fail("dataset " + full_name, "a dataset", "something else");
    }
    return opened;
  }

  Handle dataset(hid_t parent, const std::string& name, const std::string& full_name,
                 const DatasetShape& shape) const {
    Handle opened = dataset(parent, name, full_name);
    const std::string what = "dataset " + full_name;
    const std::vector<std::int64_t> found = dimensions(opened, what);
    if (found != shape.dimensions) {
      fail(what, dimensions_text(shape.dimensions), dimensions_text(found));
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

  std::vector<std::int64_t> dimensions(const Handle& opened, const std::string& what) const {
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

  std::string text(hid_t owner, const std::string& name) const {
    const Opened opened = attribute(owner, name);
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

  std::int64_t number(hid_t owner, const std::string& name, std::int64_t least) const {
    const Opened opened = attribute(owner, name);
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

  const std::filesystem::path& path() const { return path_; }

 private:
  struct Opened {
    Handle attribute;
    Handle type;
  };

  Opened attribute(hid_t owner, const std::string& name) const {
    if (H5Aexists(owner, name.c_str()) <= 0) {
      fail("attribute " + name, "a value", "nothing");
    }
    Opened opened{Handle(H5Aopen(owner, name.c_str(), H5P_DEFAULT), H5Aclose), {}};
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

  std::filesystem::path path_;
  std::uint64_t file_bytes_;
};

void require_shape(bool fits, const char* what) {
  if (!fits) {
    throw std::invalid_argument(std::string("calibration store: ") + what);
  }
}

}  // namespace

struct CalibrationWriter::Impl {
  Impl(const std::filesystem::path& path, CalibrationHeader the_header, std::int64_t the_length)
      : header(std::move(the_header)), length(the_length), pending(path), writing(pending.partial_path()) {}
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    const LibraryLock lock;
    layers.close();
    file.close();
  }

  CalibrationHeader header;
  std::int64_t length;
  std::int64_t next_layer = 0;
  PendingFile pending;
  Writing writing;
  Handle file;
  Handle layers;
};

CalibrationWriter::CalibrationWriter(const std::filesystem::path& path, const CalibrationHeader& header,
                                     const Sequences& sequences) {
  require_shape(header.hidden_size > 0 && header.num_hidden_layers > 0 && header.num_attention_heads > 0,
                "the header has a size below 1");
  const std::optional<std::uint64_t> token_bytes =
      dense_bytes(std::array{sequences.count, sequences.length}, 4);
  require_shape(sequences.count > 0 && sequences.length > 0 && token_bytes &&
                    *token_bytes / 4 == sequences.tokens.size(),
                "the tokens do not fill the sequences");
  const LibraryLock lock;
  impl_ = std::make_unique<Impl>(path, header, sequences.length);
  const Writing& writing = impl_->writing;

  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  writing.require(H5Pset_obj_track_times(creation.get(), false) >= 0 &&
                      H5Pset_libver_bounds(access.get(), H5F_LIBVER_V18, H5F_LIBVER_V18) >= 0 &&
                      H5Pset_file_locking(access.get(), false, true) >= 0 &&
                      H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG) >= 0,
                  "an HDF5 file with these settings");
  impl_->file =
      Handle(H5Fcreate(impl_->pending.partial_path().c_str(), H5F_ACC_TRUNC, creation.get(), access.get()),
             H5Fclose);
  writing.require(impl_->file.valid(), "an HDF5 file");

  const hid_t file = impl_->file.get();
  writing.add_text(file, "format", kFormat);
  writing.add_number(file, "format_version", kFormatVersion);
  writing.add_text(file, "creator", kCreator);
  writing.add_text(file, "source_fingerprint", header.source_fingerprint);
  writing.add_text(file, "source_config", header.source_config);
  writing.add_text(file, "model_type", header.model_type);
  writing.add_number(file, "hidden_size", header.hidden_size);
  writing.add_number(file, "num_hidden_layers", header.num_hidden_layers);
  writing.add_number(file, "num_attention_heads", header.num_attention_heads);
  writing.add_text(file, "compute", header.compute);

  const Handle tokens = writing.add_dataset(file, "tokens", tokens_shape(sequences.count, sequences.length),
                                            {"sequence", "position"}, "token id");
  writing.require(
      H5Dwrite(tokens.get(), H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, sequences.tokens.data()) >= 0,
      "the tokens");
  impl_->layers = writing.add_group(file, "layers");
}

CalibrationWriter::~CalibrationWriter() = default;

void CalibrationWriter::add_layer(const LayerMoments& moments) {
  const Stage stage("write");
  const CalibrationHeader& header = impl_->header;
  if (!impl_->file.valid() || impl_->next_layer == header.num_hidden_layers) {
    throw std::logic_error("calibration store: a layer more than the header says");
  }
  require_shape(moments.tokens > 0, "a layer is over no tokens");
  require_shape(moments.second_moment.rows() == header.hidden_size &&
                    moments.second_moment.cols() == header.hidden_size,
                "second_moment does not fit the header");
  require_shape(moments.mean.size() == header.hidden_size, "mean does not fit the header");
  require_shape(moments.distance_mass.rows() == header.num_attention_heads &&
                    moments.distance_mass.cols() == impl_->length,
                "distance_mass does not fit the header");

  const LibraryLock lock;
  const Writing& writing = impl_->writing;
  const std::string name = layer_path(impl_->next_layer);
  const Handle layer = writing.add_group(impl_->layers.get(), layer_name(impl_->next_layer));
  writing.add_number(layer.get(), "tokens", moments.tokens);
  const LayerShapes shapes = layer_shapes(header, impl_->length);
  const Handle second_moment = writing.add_dataset(layer.get(), "second_moment", shapes.second_moment,
                                                   {"hidden", "hidden"}, "square of the normed input");
  writing.require(write_matrix(second_moment.get(), moments.second_moment), name + "/second_moment");
  const Handle mean = writing.add_dataset(layer.get(), "mean", shapes.mean, {"hidden"}, "normed input");
  writing.require(
      H5Dwrite(mean.get(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, moments.mean.data()) >= 0,
      name + "/mean");
  const Handle distance_mass = writing.add_dataset(layer.get(), "distance_mass", shapes.distance_mass,
                                                   {"head", "distance"}, "probability");
  writing.require(write_matrix(distance_mass.get(), moments.distance_mass), name + "/distance_mass");
  ++impl_->next_layer;
}

void CalibrationWriter::finish() {
  if (impl_->next_layer != impl_->header.num_hidden_layers || !impl_->file.valid()) {
    throw std::logic_error("calibration store: " + std::to_string(impl_->next_layer) + " of " +
                           std::to_string(impl_->header.num_hidden_layers) + " layers were added");
  }
  {
    const LibraryLock lock;
    const bool closed = impl_->layers.close() && impl_->file.close();
    impl_->writing.require(closed, "the end of the HDF5 file");
  }
  impl_->pending.commit();
}

struct CalibrationFile::Impl {
  Impl(const std::filesystem::path& path, std::uint64_t file_bytes) : reading(path, file_bytes) {}
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    const LibraryLock lock;
    layers.close();
    file.close();
  }

  Handle dataset(std::int64_t layer_idx, const Handle& layer, const std::string& name,
                 const DatasetShape& shape) const {
    return reading.dataset(layer.get(), name, layer_path(layer_idx) + "/" + name, shape);
  }

  Handle layer_group(std::int64_t layer_idx) const {
    return reading.group(layers.get(), layer_name(layer_idx), layer_path(layer_idx));
  }

  Reading reading;
  CalibrationHeader header;
  std::int64_t count = 0;
  std::int64_t length = 0;
  Handle file;
  Handle layers;
};

CalibrationFile::CalibrationFile(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CalibrationFile::CalibrationFile(CalibrationFile&&) noexcept = default;
CalibrationFile& CalibrationFile::operator=(CalibrationFile&&) noexcept = default;
CalibrationFile::~CalibrationFile() = default;

CalibrationFile CalibrationFile::open(const std::filesystem::path& path) {
  // Complains about anything but a readable regular file, and knows its size.
  const std::uint64_t file_bytes = MappedFile::open(path).bytes().size();
  const LibraryLock lock;
  auto impl = std::make_unique<Impl>(path, file_bytes);
  const Reading& reading = impl->reading;
  if (H5Fis_hdf5(path.c_str()) <= 0) {
    reading.fail("not a calibration store", "an HDF5 file", "something else");
  }
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_file_locking(access.get(), false, true);
  H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
  impl->file = Handle(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
  if (!impl->file.valid()) {
    reading.fail("the HDF5 file is truncated or damaged", "", "");
  }
  const hid_t file = impl->file.get();
  const std::string format = reading.text(file, "format");
  if (format != kFormat) {
    reading.fail("format", std::string(kFormat), format);
  }
  const std::int64_t version = reading.number(file, "format_version", 1);
  if (version > kFormatVersion) {
    reading.fail("format_version (a newer relatent wrote this file)", std::to_string(kFormatVersion),
                 std::to_string(version));
  }
  CalibrationHeader& header = impl->header;
  header.source_fingerprint = reading.text(file, "source_fingerprint");
  header.source_config = reading.text(file, "source_config");
  header.model_type = reading.text(file, "model_type");
  header.hidden_size = reading.number(file, "hidden_size", 1);
  header.num_hidden_layers = reading.number(file, "num_hidden_layers", 1);
  header.num_attention_heads = reading.number(file, "num_attention_heads", 1);
  header.compute = reading.text(file, "compute");

  const std::vector<std::int64_t> tokens =
      reading.dimensions(reading.dataset(file, "tokens", "/tokens"), "dataset /tokens");
  if (tokens.size() != 2 || tokens[0] < 1 || tokens[1] < 1) {
    reading.fail("dataset /tokens", "[sequences, length]", dimensions_text(tokens));
  }
  impl->count = tokens[0];
  impl->length = tokens[1];
  static_cast<void>(reading.dataset(file, "tokens", "/tokens", tokens_shape(impl->count, impl->length)));

  impl->layers = reading.group(file, "layers", "/layers");
  const LayerShapes shapes = layer_shapes(header, impl->length);
  for (std::int64_t i = 0; i < header.num_hidden_layers; ++i) {
    const Handle layer = impl->layer_group(i);
    static_cast<void>(reading.number(layer.get(), "tokens", 1));
    static_cast<void>(impl->dataset(i, layer, "second_moment", shapes.second_moment));
    static_cast<void>(impl->dataset(i, layer, "mean", shapes.mean));
    static_cast<void>(impl->dataset(i, layer, "distance_mass", shapes.distance_mass));
  }
  return CalibrationFile(std::move(impl));
}

const CalibrationHeader& CalibrationFile::header() const {
  return impl_->header;
}

const std::filesystem::path& CalibrationFile::path() const {
  return impl_->reading.path();
}

Sequences CalibrationFile::sequences() const {
  const LibraryLock lock;
  const Reading& reading = impl_->reading;
  const Handle dataset =
      reading.dataset(impl_->file.get(), "tokens", "/tokens", tokens_shape(impl_->count, impl_->length));
  Sequences sequences{.count = impl_->count, .length = impl_->length, .tokens = {}};
  sequences.tokens.resize(static_cast<std::size_t>(impl_->count * impl_->length));
  if (H5Dread(dataset.get(), H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, sequences.tokens.data()) < 0) {
    reading.fail("dataset /tokens", "token ids", "unreadable bytes");
  }
  const auto negative = std::find_if(sequences.tokens.begin(), sequences.tokens.end(),
                                     [](std::int32_t token) { return token < 0; });
  if (negative != sequences.tokens.end()) {
    reading.fail("dataset /tokens", "ids from 0", std::to_string(*negative));
  }
  return sequences;
}

LayerMoments CalibrationFile::layer(std::int64_t layer_idx) const {
  if (layer_idx < 0 || layer_idx >= impl_->header.num_hidden_layers) {
    throw std::out_of_range("calibration store: there is no layer " + std::to_string(layer_idx));
  }
  const LibraryLock lock;
  const Reading& reading = impl_->reading;
  const CalibrationHeader& header = impl_->header;
  const LayerShapes shapes = layer_shapes(header, impl_->length);
  const Handle layer = impl_->layer_group(layer_idx);
  // All three fit into the file before any is allocated.
  const Handle second_moment = impl_->dataset(layer_idx, layer, "second_moment", shapes.second_moment);
  const Handle mean = impl_->dataset(layer_idx, layer, "mean", shapes.mean);
  const Handle distance_mass = impl_->dataset(layer_idx, layer, "distance_mass", shapes.distance_mass);
  LayerMoments moments;
  moments.tokens = reading.number(layer.get(), "tokens", 1);
  moments.second_moment.resize(header.hidden_size, header.hidden_size);
  moments.mean.resize(header.hidden_size);
  moments.distance_mass.resize(header.num_attention_heads, impl_->length);
  const auto check = [&](bool was_read, const auto& values, const char* name) {
    if (!was_read || !values.allFinite()) {
      reading.fail("dataset " + layer_path(layer_idx) + "/" + name, "finite numbers",
                   was_read ? "others" : "unreadable bytes");
    }
  };
  check(read_matrix(second_moment.get(), moments.second_moment), moments.second_moment, "second_moment");
  check(H5Dread(mean.get(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, moments.mean.data()) >= 0,
        moments.mean, "mean");
  check(read_matrix(distance_mass.get(), moments.distance_mass), moments.distance_mass, "distance_mass");
  return moments;
}

}  // namespace relatent
