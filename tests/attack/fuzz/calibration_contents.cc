// A calibration store (formats/calibration_store.h) that libhdf5 finds nothing wrong with and that is wrong
// all the same. The input is a list of choices: whether checksums are made to fit at the end, and what to
// change by libhdf5's own functions: attributes, links and datasets of other kinds, shapes, layouts and
// values.
#include <hdf5.h>

#include <array>
#include <cmath>
#include <limits>

#include "formats/hdf5.h"
#include "tests/attack/fuzz/fuzz.h"
#include "tests/attack/fuzz/stores.h"

namespace {

using relatent::hdf5::Handle;

constexpr std::array<const char*, 12> kObjects = {"/",
                                                  "/tokens",
                                                  "/layers",
                                                  "/layers/00000",
                                                  "/layers/00000/second_moment",
                                                  "/layers/00000/mean",
                                                  "/layers/00000/received_moment",
                                                  "/layers/00000/distance_mass",
                                                  "/layers/00000/mass_square",
                                                  "/layers/00000/score_effect",
                                                  "/layers/00001",
                                                  "/layers/00001/mean"};
constexpr std::array<const char*, 15> kAttributes = {
    "format",      "format_version", "source_fingerprint", "source_config",       "model_type",
    "hidden_size", "tokens",         "num_hidden_layers",  "num_attention_heads", "num_key_value_heads",
    "head_dim",    "compute",        "checksum",           "dimensions",          "unit"};
constexpr std::array<std::int64_t, 12> kNumbers = {0,
                                                   1,
                                                   2,
                                                   3,
                                                   4,
                                                   -1,
                                                   255,
                                                   std::int64_t{1} << 31U,
                                                   std::int64_t{1} << 32U,
                                                   std::int64_t{1} << 40U,
                                                   std::numeric_limits<std::int64_t>::max(),
                                                   std::numeric_limits<std::int64_t>::min()};
constexpr std::array<double, 10> kValues = {
    0, 1, 0.25, -1, 2.5, 1e300, -1e-300, NAN, INFINITY, std::numeric_limits<double>::denorm_min()};
constexpr std::array<const char*, 7> kTexts = {
    "", "relatent-calibration", "float32", "bfloat16", "llama", "\xff", "{}"};
constexpr std::array<hsize_t, 7> kSizes = {0, 1, 2, 3, 4, 16, hsize_t{1} << 40U};
// Of a dataset that is filled, in elements.
constexpr hsize_t kMost = 4096;

// The input, choice by choice; zeros behind its end.
class Choices {
 public:
  Choices(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}
  bool done() const { return rest_.empty(); }
  std::size_t below(std::size_t limit) {
    if (rest_.empty()) {
      return 0;
    }
    const std::size_t out = rest_.front() % limit;
    rest_ = rest_.subspan(1);
    return out;
  }
  template <typename List>
  auto of(const List& list) {
    return list[below(list.size())];
  }

 private:
  std::span<const std::uint8_t> rest_;
};

// What a type is called counts, not what it holds.
Handle type_of(Choices& choices) {
  const std::array<hid_t, 10> types = {H5T_IEEE_F64LE, H5T_IEEE_F64BE, H5T_IEEE_F32LE, H5T_STD_I32LE,
                                       H5T_STD_I32BE,  H5T_STD_I64LE,  H5T_STD_U64LE,  H5T_STD_I8LE,
                                       H5T_STD_U16LE,  H5T_STD_B32LE};
  return {H5Tcopy(choices.of(types)), H5Tclose};
}

Handle space_of(Choices& choices) {
  const std::array<hsize_t, 4> sizes = {1, 1, 2, 0};
  switch (choices.below(6)) {
    case 0:
      return {H5Screate(H5S_NULL), H5Sclose};
    case 1:
      return {H5Screate_simple(1, sizes.data(), nullptr), H5Sclose};
    case 2:
      return {H5Screate_simple(2, sizes.data(), nullptr), H5Sclose};
    case 3:
      return {H5Screate_simple(3, sizes.data(), nullptr), H5Sclose};
    case 4:
      return {H5Screate_simple(1, sizes.data() + 3, nullptr), H5Sclose};
    default:
      return {H5Screate(H5S_SCALAR), H5Sclose};
  }
}

void put_attribute(hid_t owner, const char* name, const Handle& stored, const Handle& space, hid_t type,
                   const void* value) {
  H5Adelete(owner, name);
  const Handle attribute(H5Acreate2(owner, name, stored.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT),
                         H5Aclose);
  if (attribute.valid() && H5Sget_simple_extent_npoints(space.get()) == 1) {
    H5Awrite(attribute.get(), type, value);
  }
}

void put_number(hid_t owner, const char* name, Choices& choices) {
  const Handle stored = type_of(choices);
  const Handle space = space_of(choices);
  const std::int64_t number = choices.of(kNumbers);
  put_attribute(owner, name, stored, space, H5T_NATIVE_INT64, &number);
}

void put_text(hid_t owner, const char* name, Choices& choices) {
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  const std::array<std::size_t, 6> sizes = {1, 2, 20, 32, 3000, 60000};
  std::string text = choices.of(kTexts);
  const char* pointer = text.c_str();
  const bool variable = choices.below(4) == 0;
  H5Tset_size(type.get(), variable ? H5T_VARIABLE : choices.of(sizes));
  const std::array<H5T_str_t, 3> paddings = {H5T_STR_NULLTERM, H5T_STR_NULLPAD, H5T_STR_SPACEPAD};
  H5Tset_strpad(type.get(), choices.of(paddings));
  const Handle space = space_of(choices);
  if (!variable) {
    text.resize(H5Tget_size(type.get()), choices.below(2) == 0 ? '\0' : 'x');
  }
  put_attribute(owner, name, type, space, type.get(),
                variable ? static_cast<const void*>(&pointer) : text.data());
}

void put_link(hid_t file, const char* name, Choices& choices) {
  const char* target = choices.of(kObjects);
  switch (choices.below(6)) {
    case 0:
      H5Lcreate_soft(target, file, name, H5P_DEFAULT, H5P_DEFAULT);
      break;
    case 1:
      H5Lcreate_external("written", target, file, name, H5P_DEFAULT, H5P_DEFAULT);
      break;
    case 2:
      H5Lcreate_hard(file, target, file, name, H5P_DEFAULT, H5P_DEFAULT);
      break;
    case 3:
      static_cast<void>(Handle(H5Gcreate2(file, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), H5Gclose));
      break;
    case 4: {
      const Handle type = type_of(choices);
      H5Tcommit2(file, name, type.get(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
      break;
    }
    default:  // nothing in its place
      break;
  }
}

void put_dataset(hid_t file, const char* name, Choices& choices) {
  const Handle type = type_of(choices);
  std::vector<hsize_t> sizes(choices.below(4));
  hsize_t elements = 1;
  for (hsize_t& size : sizes) {
    size = choices.of(kSizes);
    elements = size == 0 ? 0 : std::min(elements * size, kMost + 1);
  }
  const Handle space(H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr), H5Sclose);
  const Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  const std::vector<hsize_t> chunk(sizes.size(), 1);
  switch (choices.below(6)) {
    case 0:
      H5Pset_layout(properties.get(), H5D_COMPACT);
      break;
    case 1:
      H5Pset_chunk(properties.get(), static_cast<int>(chunk.size()), chunk.data());
      break;
    case 2:
      H5Pset_external(properties.get(), (relatent::fuzz::folder() / "written").c_str(), 0, H5F_UNLIMITED);
      break;
    case 3:
      H5Pset_alloc_time(properties.get(), H5D_ALLOC_TIME_LATE);
      break;
    default:
      break;
  }
  const Handle dataset(
      H5Dcreate2(file, name, type.get(), space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT), H5Dclose);
  const std::vector<double> values(kMost, choices.of(kValues));
  if (dataset.valid() && elements <= kMost && choices.below(4) != 0) {
    H5Dwrite(dataset.get(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data());
  }
}

// Another number at one place of a dataset, whose type stays.
void put_value(hid_t file, const char* name, Choices& choices) {
  const Handle dataset(H5Dopen2(file, name, H5P_DEFAULT), H5Dclose);
  const Handle space(dataset.valid() ? H5Dget_space(dataset.get()) : H5I_INVALID_HID, H5Sclose);
  const hssize_t elements = space.valid() ? H5Sget_simple_extent_npoints(space.get()) : 0;
  if (elements < 1 || static_cast<hsize_t>(elements) > kMost) {
    return;
  }
  std::vector<double> values(static_cast<std::size_t>(elements));
  if (H5Dread(dataset.get(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) >= 0) {
    values[choices.below(values.size())] = choices.of(kValues);
    H5Dwrite(dataset.get(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data());
  }
}

void change(hid_t file, Choices& choices) {
  const char* name = choices.of(kObjects);
  const std::size_t kind = choices.below(8);
  if (kind < 4) {
    const Handle owner(H5Oopen(file, name, H5P_DEFAULT), H5Oclose);
    const char* attribute = choices.of(kAttributes);
    if (!owner.valid()) {
      return;
    }
    if (kind == 0) {
      H5Adelete(owner.get(), attribute);
    } else if (kind == 1) {
      put_text(owner.get(), attribute, choices);
    } else {
      put_number(owner.get(), attribute, choices);
    }
    return;
  }
  if (kind == 4) {
    put_value(file, name, choices);
    return;
  }
  H5Ldelete(file, name, H5P_DEFAULT);
  if (kind == 5) {
    put_link(file, name, choices);
  } else {
    put_dataset(file, name, choices);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  static const std::string store = fuzz::newest_store(2);
  constexpr int most_changes = 8;
  Choices choices(data, size);
  const bool binds = choices.below(2) == 0;
  const std::filesystem::path path = fuzz::put("store.h5", store);
  {
    const hdf5::LibraryLock lock;
    const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
    const Handle file(H5Fopen(path.c_str(), H5F_ACC_RDWR, access.get()), H5Fclose);
    fuzz::require(file.valid(), "a store that cannot be opened");
    for (int i = 0; i < most_changes && !choices.done(); ++i) {
      change(file.get(), choices);
    }
    if (binds) {
      fuzz::bind_again(file.get(), path);
    }
  }
  fuzz::touch_store(path);
  return 0;
}
