#include "formats/calibration_store.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <optional>
#include <span>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "formats/calibration_checks.h"
#include "formats/file_identity.h"
#include "formats/files.h"
#include "formats/hash.h"
#include "formats/hdf5.h"
#include "formats/mapped_file.h"
#include "formats/state_file.h"
#include "formats/tensor_file.h"
#include "linalg/stages.h"

namespace relatent {
namespace {

using hdf5::DatasetShape;
using hdf5::Handle;
using hdf5::LibraryLock;
using hdf5::Reading;
using hdf5::Writing;

constexpr std::string_view kFormat = "relatent-calibration";
constexpr std::int64_t kFormatVersion = 5;
constexpr std::string_view kCreator = "relatent " RELATENT_VERSION;

std::string layer_name(std::int64_t layer_idx) {
  std::string digits = std::to_string(layer_idx);
  digits.insert(0, digits.size() < 5 ? 5 - digits.size() : 0, '0');
  return digits;
}

std::string layer_path(std::int64_t layer_idx) {
  return "/layers/" + layer_name(layer_idx);
}

DatasetShape tokens_shape(std::int64_t count, std::int64_t length) {
  return {H5T_STD_I32LE, "int32", {count, length}};
}

struct LayerDataset {
  std::string name;
  DatasetShape shape;
  std::vector<std::string_view> dimensions;
  std::string unit;
};

bool has_normed_heads(const CalibrationHeader& header) {
  return header.head_dim > 0;
}

// Calls body(dataset, values) for all datasets of a layer, in the order in which they are written. moments
// has normed_heads where the header says so.
template <typename Moments, typename Body>
void for_datasets(const CalibrationHeader& header, std::int64_t length, Moments& moments, const Body& body) {
  const auto floats = [](std::vector<std::int64_t> sizes) {
    return DatasetShape{H5T_IEEE_F64LE, "float64", std::move(sizes)};
  };
  const std::int64_t hidden = header.hidden_size;
  const std::int64_t heads = header.num_attention_heads;
  const auto second = [&](const char* name, auto& values) {
    body(LayerDataset{name, floats({hidden, hidden}), {"hidden", "hidden"}, "square of the normed input"},
         values);
  };
  const auto mean = [&](const char* name, auto& values) {
    body(LayerDataset{name, floats({hidden}), {"hidden"}, "normed input"}, values);
  };
  second("second_moment", moments.second_moment);
  mean("mean", moments.mean);
  second("received_moment", moments.received_moment);
  mean("received_mean", moments.received_mean);
  body(LayerDataset{"distance_mass", floats({heads, length}), {"head", "distance"}, "probability"},
       moments.distance_mass);
  body(LayerDataset{"mass_square", floats({heads}), {"head"}, "square of a probability"},
       moments.mass_square);
  body(LayerDataset{"score_effect", floats({heads}), {"head"}, "square of an output"}, moments.score_effect);
  if (!has_normed_heads(header)) {
    return;
  }
  auto& normed = *moments.normed_heads;
  const std::int64_t d = header.head_dim;
  const std::int64_t keys = header.num_key_value_heads * d;
  const std::string unit = "normalised key or value";
  body(LayerDataset{"feature_moment", floats({2 * keys, 2 * keys}), {"feature", "feature"}, "square of one"},
       normed.feature_moment);
  body(LayerDataset{"feature_mean", floats({2 * keys}), {"feature"}, unit}, normed.feature_mean);
  body(
      LayerDataset{
          "query_moment", floats({heads * d, d}), {"query", "head_dim"}, "square of a normalised query"},
      normed.query_moment);
  body(LayerDataset{"query_mean", floats({heads * d}), {"query"}, "normalised query"}, normed.query_mean);
  body(LayerDataset{"normed_cross",
                    floats({heads * d + keys, hidden}),
                    {"query or key", "hidden"},
                    "normalised query or key times normed input"},
       normed.cross);
}

// The beginning of what the file's own checksum is over; the checksums of the datasets, each in its place,
// follow, so that none of them is right in another place or with other attributes.
void hash_header(const CalibrationHeader& header, Hasher& bound) {
  for (const std::string& text :
       {header.source_fingerprint, header.source_config, header.model_type, header.compute}) {
    bound.add_text(text);
  }
  for (const std::int64_t number : {header.hidden_size, header.num_hidden_layers, header.num_attention_heads,
                                    header.num_key_value_heads, header.head_dim}) {
    bound.add_number(static_cast<std::uint64_t>(number));
  }
}

// Room for what a layer of this header has.
LayerMoments empty_layer(const CalibrationHeader& header) {
  LayerMoments out;
  if (has_normed_heads(header)) {
    out.normed_heads.emplace();
  }
  return out;
}

// Nothing notices damage to the metadata of an older file, and libhdf5 does not survive all that it then
// reads.
bool has_metadata_checksums(std::span<const std::byte> bytes) {
  constexpr std::string_view signature = "\x89HDF\r\n\x1a\n";
  constexpr std::byte first_with_checksums{2};
  return bytes.size() > signature.size() &&
         std::memcmp(bytes.data(), signature.data(), signature.size()) == 0 &&
         bytes[signature.size()] >= first_with_checksums;
}

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

  void add_checksum(const Handle& dataset, const Hasher& values) {
    writing.add_checksum(dataset, values);
    bound.add_text(values.hexadecimal());
  }

  void write(const Handle& dataset, const MatrixD& values, const std::string& name) {
    Hasher hasher;
    writing.require(hdf5::write_matrix(dataset.get(), values, hasher), name);
    add_checksum(dataset, hasher);
  }
  void write(const Handle& dataset, const VectorD& values, const std::string& name) {
    writing.require(
        H5Dwrite(dataset.get(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) >= 0, name);
    Hasher hasher;
    hasher.add(bytes_of(values));
    add_checksum(dataset, hasher);
  }

  CalibrationHeader header;
  std::int64_t length;
  std::int64_t next_layer = 0;
  Hasher bound;
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
      dense_bytes(DType::i32, {sequences.count, sequences.length});
  require_shape(sequences.count > 0 && sequences.length > 0 && token_bytes &&
                    *token_bytes / 4 == sequences.tokens.size(),
                "the tokens do not fill the sequences");
  const LibraryLock lock;
  impl_ = std::make_unique<Impl>(path, header, sequences.length);
  const Writing& writing = impl_->writing;

  impl_->file = writing.create_file();
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
  writing.add_number(file, "num_key_value_heads", header.num_key_value_heads);
  writing.add_number(file, "head_dim", header.head_dim);
  writing.add_text(file, "compute", header.compute);
  hash_header(header, impl_->bound);

  const Handle tokens = writing.add_dataset(file, "tokens", tokens_shape(sequences.count, sequences.length),
                                            {"sequence", "position"}, "token id");
  writing.require(
      H5Dwrite(tokens.get(), H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, sequences.tokens.data()) >= 0,
      "the tokens");
  Hasher hasher;
  hasher.add(bytes_of(sequences.tokens));
  impl_->add_checksum(tokens, hasher);
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
  require_shape(moments.normed_heads.has_value() == has_normed_heads(header),
                "moments of normalised heads do not fit the header");
  for_datasets(header, impl_->length, moments, [](const LayerDataset& dataset, const auto& values) {
    const std::vector<std::int64_t>& sizes = dataset.shape.dimensions;
    require_shape(values.rows() == sizes.front() && values.cols() == (sizes.size() > 1 ? sizes.back() : 1),
                  (dataset.name + " does not fit the header").c_str());
  });

  const LibraryLock lock;
  const Writing& writing = impl_->writing;
  const std::string name = layer_path(impl_->next_layer);
  const Handle layer = writing.add_group(impl_->layers.get(), layer_name(impl_->next_layer));
  writing.add_number(layer.get(), "tokens", moments.tokens);
  impl_->bound.add_number(static_cast<std::uint64_t>(moments.tokens));
  for_datasets(header, impl_->length, moments, [&](const LayerDataset& dataset, const auto& values) {
    const Handle handle =
        writing.add_dataset(layer.get(), dataset.name, dataset.shape, dataset.dimensions, dataset.unit);
    impl_->write(handle, values, name + "/" + dataset.name);
  });
  ++impl_->next_layer;
}

void CalibrationWriter::finish() {
  if (impl_->next_layer != impl_->header.num_hidden_layers || !impl_->file.valid()) {
    throw std::logic_error("calibration store: " + std::to_string(impl_->next_layer) + " of " +
                           std::to_string(impl_->header.num_hidden_layers) + " layers were added");
  }
  {
    const LibraryLock lock;
    impl_->writing.add_text(impl_->file.get(), "checksum", impl_->bound.hexadecimal());
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

  Handle dataset(std::int64_t layer_idx, const Handle& layer, const LayerDataset& dataset) const {
    return reading.dataset(layer.get(), dataset.name, layer_path(layer_idx) + "/" + dataset.name,
                           dataset.shape);
  }

  static bool read(const Handle& dataset, MatrixD& values, Hasher& hasher) {
    return hdf5::read_matrix(dataset.get(), values, hasher);
  }
  static bool read(const Handle& dataset, VectorD& values, Hasher& hasher) {
    const bool done =
        H5Dread(dataset.get(), H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) >= 0;
    hasher.add(bytes_of(values));
    return done;
  }

  Handle layer_group(std::int64_t layer_idx) const {
    return reading.group(layers.get(), layer_name(layer_idx), layer_path(layer_idx));
  }

  Reading reading;
  ReadFiles read_files;
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
  ReadFiles read_files;
  read_files.note(path);
  // Complains about anything but a readable regular file, and knows its size.
  const MappedFile mapped = MappedFile::open(path);
  const LibraryLock lock;
  auto impl = std::make_unique<Impl>(path, mapped.bytes().size());
  impl->read_files = std::move(read_files);
  const Reading& reading = impl->reading;
  if (H5Fis_hdf5(path.c_str()) <= 0) {
    reading.fail("not a calibration store", "an HDF5 file", "something else");
  }
  if (!has_metadata_checksums(mapped.bytes())) {
    reading.fail("its metadata has no checksums", "an HDF5 file as `relatent calibrate` writes it",
                 "one of an older format");
  }
  impl->file = reading.open_file();
  const hid_t file = impl->file.get();
  const std::string format = reading.text(file, "format");
  if (format != kFormat) {
    reading.fail("format", std::string(kFormat), format);
  }
  const std::int64_t version = reading.number(file, "format_version", 1);
  if (version != kFormatVersion) {
    reading.fail(version > kFormatVersion
                     ? "format_version (a newer relatent wrote this file)"
                     : "format_version (an earlier relatent wrote this file, without what "
                       "this one needs: run `relatent calibrate` again)",
                 std::to_string(kFormatVersion), std::to_string(version));
  }
  CalibrationHeader& header = impl->header;
  header.source_fingerprint = reading.text(file, "source_fingerprint");
  header.source_config = reading.text(file, "source_config");
  header.model_type = reading.text(file, "model_type");
  header.hidden_size = reading.number(file, "hidden_size", 1);
  header.num_hidden_layers = reading.number(file, "num_hidden_layers", 1);
  header.num_attention_heads = reading.number(file, "num_attention_heads", 1);
  header.num_key_value_heads = reading.number(file, "num_key_value_heads", 0);
  header.head_dim = reading.number(file, "head_dim", header.num_key_value_heads > 0 ? 1 : 0);
  header.compute = reading.text(file, "compute");
  Hasher bound;
  hash_header(header, bound);

  const std::vector<std::int64_t> tokens =
      reading.dimensions(reading.dataset(file, "tokens", "/tokens"), "dataset /tokens");
  if (tokens.size() != 2 || tokens[0] < 1 || tokens[1] < 1) {
    reading.fail("dataset /tokens", "[sequences, length]", shape_text(tokens));
  }
  impl->count = tokens[0];
  impl->length = tokens[1];
  const auto bind = [&](const Handle& dataset) { bound.add_text(reading.text(dataset.get(), "checksum")); };
  bind(reading.dataset(file, "tokens", "/tokens", tokens_shape(impl->count, impl->length)));

  impl->layers = reading.group(file, "layers", "/layers");
  for (std::int64_t i = 0; i < header.num_hidden_layers; ++i) {
    const Handle layer = impl->layer_group(i);
    bound.add_number(static_cast<std::uint64_t>(reading.number(layer.get(), "tokens", 1)));
    LayerMoments nothing = empty_layer(header);
    for_datasets(header, impl->length, nothing,
                 [&](const LayerDataset& dataset, const auto&) { bind(impl->dataset(i, layer, dataset)); });
  }
  const std::string expected = reading.text(file, "checksum");
  if (const std::string found = bound.hexadecimal(); found != expected) {
    reading.fail("attributes or datasets are not those that were written together", "checksum " + expected,
                 found);
  }
  return CalibrationFile(std::move(impl));
}

const CalibrationHeader& CalibrationFile::header() const {
  return impl_->header;
}

const std::filesystem::path& CalibrationFile::path() const {
  return impl_->reading.path();
}

void CalibrationFile::require_unchanged() const {
  impl_->read_files.require_unchanged();
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
  Hasher hasher;
  hasher.add(bytes_of(sequences.tokens));
  reading.check_checksum(dataset, "/tokens", hasher);
  return sequences;
}

LayerMoments CalibrationFile::layer(std::int64_t layer_idx) const {
  if (layer_idx < 0 || layer_idx >= impl_->header.num_hidden_layers) {
    throw std::out_of_range("calibration store: there is no layer " + std::to_string(layer_idx));
  }
  const LibraryLock lock;
  const Reading& reading = impl_->reading;
  const CalibrationHeader& header = impl_->header;
  const Handle layer = impl_->layer_group(layer_idx);
  LayerMoments moments = empty_layer(header);
  moments.tokens = reading.number(layer.get(), "tokens", 1);
  // All fit into the file before any is allocated.
  std::vector<Handle> handles;
  for_datasets(header, impl_->length, moments, [&](const LayerDataset& dataset, const auto&) {
    handles.push_back(impl_->dataset(layer_idx, layer, dataset));
  });
  std::size_t next = 0;
  for_datasets(header, impl_->length, moments, [&](const LayerDataset& dataset, auto& values) {
    const std::vector<std::int64_t>& sizes = dataset.shape.dimensions;
    values.resize(sizes.front(), sizes.size() > 1 ? sizes.back() : 1);
    const Handle& handle = handles[next++];
    const std::string full_name = layer_path(layer_idx) + "/" + dataset.name;
    Hasher hasher;
    const bool was_read = Impl::read(handle, values, hasher);
    if (!was_read || !values.allFinite()) {
      reading.fail("dataset " + full_name, "finite numbers", was_read ? "others" : "unreadable bytes");
    }
    reading.check_checksum(handle, full_name, hasher);
  });
  if (const std::string wrong = why_no_moments(moments); !wrong.empty()) {
    reading.fail(layer_path(layer_idx), "moments as `relatent calibrate` writes them", wrong);
  }
  return moments;
}

}  // namespace relatent
