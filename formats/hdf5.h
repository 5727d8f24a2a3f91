// Inside formats/: what HDF5 files are read and written with, whatever they hold. The library keeps global
// state and tells of failures by return values; here a lock guards it, its objects close themselves, and
// what fails is an Error that names the file.
#pragma once

#include <hdf5.h>

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "linalg/matrix.h"

namespace relatent::hdf5 {

// Held around everything that calls the library, the macros of its types included.
class LibraryLock {
 public:
  LibraryLock();

 private:
  // Recursive because a constructor that throws destroys under the lock.
  std::scoped_lock<std::recursive_mutex> lock_;
};

// Closes what the library opened.
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

// What a dataset looks like on disk.
struct DatasetShape {
  hid_t type;  // in the file
  std::string_view type_text;
  std::vector<std::int64_t> dimensions;
};

// Writing: every call of the library may meet a full disk. Whatever fails throws Error (machine) that says
// what could not be written.
class Writing {
 public:
  explicit Writing(std::filesystem::path path) : path_(std::move(path)) {}

  void require(bool done, const std::string& what) const;

  // The file at the path, in place of what is there. Its bytes will be a function of what is put into it.
  Handle create_file() const;
  Handle add_group(hid_t parent, const std::string& name) const;
  // Its bytes lie in one piece; the attributes "dimensions" and "unit" say what they are.
  Handle add_dataset(hid_t parent, const std::string& name, const DatasetShape& shape,
                     const std::vector<std::string_view>& dimensions, std::string_view unit) const;

  // Attributes: fixed-length UTF-8 padded with NULs, int64.
  void add_text(hid_t owner, const std::string& name, std::string_view text) const;
  void add_text_list(hid_t owner, const std::string& name, const std::vector<std::string_view>& texts) const;
  void add_number(hid_t owner, const std::string& name, std::int64_t number) const;

 private:
  void add_attribute(hid_t owner, const std::string& name, const Handle& type, const Handle& space,
                     const void* value) const;

  std::filesystem::path path_;
};

// Reading: nothing is believed before it has been compared with the size of the file. Whatever is missing or
// not as asked for throws Error (input). full_name is what a member is called in the sentence.
class Reading {
 public:
  Reading(std::filesystem::path path, std::uint64_t file_bytes)
      : path_(std::move(path)), file_bytes_(file_bytes) {}

  const std::filesystem::path& path() const { return path_; }
  [[noreturn]] void fail(const std::string& problem, const std::string& expected,
                         const std::string& found) const;

  // The file at the path, which is known to begin as HDF5 files do.
  Handle open_file() const;
  Handle group(hid_t parent, const std::string& name, const std::string& full_name) const;
  Handle dataset(hid_t parent, const std::string& name, const std::string& full_name) const;
  // Of this type and shape, with all its bytes in the file.
  Handle dataset(hid_t parent, const std::string& name, const std::string& full_name,
                 const DatasetShape& shape) const;
  std::vector<std::int64_t> dimensions(const Handle& opened, const std::string& what) const;

  // Attributes of a single value: fixed-length text without the NULs at its end, an integer from `least`.
  std::string text(hid_t owner, const std::string& name) const;
  std::int64_t number(hid_t owner, const std::string& name, std::int64_t least) const;

 private:
  struct Attribute {
    Handle attribute;
    Handle type;
  };

  void require_member(hid_t parent, const std::string& name, const std::string& full_name) const;
  Attribute attribute(hid_t owner, const std::string& name) const;

  std::filesystem::path path_;
  std::uint64_t file_bytes_;
};

// The values of a whole float64 dataset [rows, columns], whose shape is the matrix's; on disk they are
// row-major. False when the library fails.
bool write_matrix(hid_t dataset, const MatrixD& matrix);
bool read_matrix(hid_t dataset, MatrixD& matrix);

}  // namespace relatent::hdf5
