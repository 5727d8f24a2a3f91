#include "formats/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "formats/error.h"

namespace relatent {
namespace {

constexpr std::uint64_t kLongestHeader = 100'000'000;
constexpr std::string_view kMetadata = "__metadata__";

// A header entry as it is spelled; offsets count from the end of the header.
struct Entry {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

// Takes a header apart while it is parsed: { NAME: { FIELD: string or [integers] } }, nothing else at any
// place.
class HeaderReader {
 public:
  explicit HeaderReader(const std::filesystem::path& file) : file_(file) {}

  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;

  bool null() { unexpected("null"); }
  bool boolean(bool value) { unexpected(value ? "true" : "false"); }
  bool number_float(double /*value*/, const std::string& text) { unexpected(text); }
  bool binary(nlohmann::json::binary_t& /*value*/) { unexpected("binary data"); }

  bool number_integer(std::int64_t value) { unexpected(std::to_string(value)); }

  bool number_unsigned(std::uint64_t value) {
    if (place_ != Place::list) {
      unexpected(std::to_string(value));
    }
    Entry& entry = entries.back();
    if (field_ == "data_offsets") {
      if (offsets_read_ == 2) {
        unexpected("a third number");
      }
      (offsets_read_ == 0 ? entry.begin : entry.end) = value;
      ++offsets_read_;
    } else {
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        unexpected(std::to_string(value));
      }
      entry.shape.push_back(static_cast<std::int64_t>(value));
    }
    return true;
  }

  bool string(std::string& value) {
    if (place_ == Place::metadata) {
      metadata[field_] = std::move(value);
      return true;
    }
    if (place_ != Place::tensor || field_ != "dtype") {
      unexpected("\"" + value + "\"");
    }
    const std::optional<DType> dtype = dtype_from_safetensors(value);
    if (!dtype) {
      complain("unknown dtype", "BF16, F16, F32 or another safetensors dtype", value);
    }
    entries.back().dtype = *dtype;
    return true;
  }

  bool start_object(std::size_t /*members*/) {
    switch (place_) {
      case Place::outside:
        place_ = Place::top;
        return true;
      case Place::top:
        place_ = name_ == kMetadata ? Place::metadata : Place::tensor;
        if (place_ == Place::tensor) {
          entries.emplace_back().name = name_;
        }
        fields_.clear();
        return true;
      default:
        unexpected("an object");
    }
  }

  bool end_object() {
    if (place_ == Place::tensor) {
      field_.clear();
      if (fields_.size() != 3) {
        complain("incomplete header entry", "dtype, shape and data_offsets",
                 std::to_string(fields_.size()) + " of them");
      }
    }
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }

  bool start_array(std::size_t /*elements*/) {
    if (place_ != Place::tensor || (field_ != "shape" && field_ != "data_offsets")) {
      unexpected("an array");
    }
    offsets_read_ = 0;
    place_ = Place::list;
    return true;
  }

  bool end_array() {
    if (field_ == "data_offsets" && offsets_read_ != 2) {
      unexpected(std::to_string(offsets_read_) + " numbers");
    }
    place_ = Place::tensor;
    return true;
  }

  bool key(std::string& text) {
    if (place_ == Place::top) {
      if (!names_.insert(text).second) {
        name_.clear();
        fail_input({.file = file_, .tensor = text, .problem = "appears twice in the header"});
      }
      name_ = text;
      field_.clear();
      return true;
    }
    if (!fields_.insert(text).second) {
      complain("the field \"" + text.substr(0, 200) + "\" appears twice", {}, {});
    }
    field_ = text;
    if (place_ == Place::tensor && field_ != "dtype" && field_ != "shape" && field_ != "data_offsets") {
      complain("unknown field in the header", "dtype, shape or data_offsets", field_);
    }
    return true;
  }

  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) {
    fail_input({.file = file_,
                .problem = "the safetensors header is not valid JSON",
                .found = "an error at byte " + std::to_string(position) + " of the header"});
  }

 private:
  enum class Place { outside, top, metadata, tensor, list };

  [[noreturn]] void complain(const std::string& problem, const std::string& expected,
                             const std::string& found) const {
    fail_input({.file = file_, .tensor = name_, .problem = problem, .expected = expected, .found = found});
  }

  [[noreturn]] void unexpected(const std::string& found) const {
    if (place_ == Place::metadata) {
      fail_input({.file = file_,
                  .problem = "metadata \"" + field_.substr(0, 200) + "\"",
                  .expected = "a string",
                  .found = found});
    }
    if (field_ == "dtype") {
      complain("dtype", "a string", found);
    }
    if (field_ == "shape") {
      complain("shape", "an array of non-negative integers", found);
    }
    if (field_ == "data_offsets") {
      complain("data_offsets", "an array of two non-negative integers", found);
    }
    complain("the safetensors header", "an object", found);
  }

  const std::filesystem::path& file_;
  Place place_ = Place::outside;
  std::string name_;
  std::string field_;
  int offsets_read_ = 0;
  std::unordered_set<std::string> names_;
  std::unordered_set<std::string> fields_;
};

std::string range_text(std::uint64_t begin, std::uint64_t end) {
  return "[" + std::to_string(begin) + ", " + std::to_string(end) + "]";
}

void check_entry(const std::filesystem::path& file, const Entry& entry) {
  if (entry.begin > entry.end) {
    fail_input({.file = file,
                .tensor = entry.name,
                .problem = "data_offsets",
                .expected = "a beginning before the end",
                .found = range_text(entry.begin, entry.end)});
  }
  const std::optional<std::uint64_t> bytes = dense_bytes(entry.dtype, entry.shape);
  const std::string what = std::string(safetensors_name(entry.dtype)) + " " + shape_text(entry.shape);
  if (!bytes) {
    fail_input({.file = file,
                .tensor = entry.name,
                .problem = "shape",
                .expected = "a byte count below 2^64",
                .found = what});
  }
  if (*bytes != entry.end - entry.begin) {
    fail_input(
        {.file = file,
         .tensor = entry.name,
         .problem = "data_offsets",
         .expected = std::to_string(*bytes) + " bytes for " + what,
         .found = std::to_string(entry.end - entry.begin) + " in " + range_text(entry.begin, entry.end)});
  }
}

// Sorts the entries by place and checks that they fill [0, data_bytes) without hole or overlap.
void check_layout(const std::filesystem::path& file, std::vector<Entry>& entries, std::uint64_t data_bytes) {
  // An empty tensor shares its beginning with the next one and has to come first.
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t next = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != next) {
      fail_input({.file = file,
                  .tensor = entry.name,
                  .problem = entry.begin > next ? "unused bytes before its data" : "overlaps another tensor",
                  .expected = "data from byte " + std::to_string(next),
                  .found = std::to_string(entry.begin)});
    }
    next = entry.end;
    if (next > data_bytes) {
      fail_input({.file = file,
                  .tensor = entry.name,
                  .problem = "the file is truncated",
                  .expected = "data up to byte " + std::to_string(next),
                  .found = std::to_string(data_bytes) + " bytes of data"});
    }
  }
  if (next != data_bytes) {
    fail_input({.file = file,
                .problem = "bytes after the last tensor",
                .expected = std::to_string(next) + " bytes of data",
                .found = std::to_string(data_bytes)});
  }
}

std::string_view header_of(const std::filesystem::path& file, std::span<const std::byte> bytes) {
  if (bytes.size() < kSafetensorsPrefix) {
    fail_input({.file = file,
                .problem = "not a safetensors file",
                .expected = "at least 8 bytes",
                .found = std::to_string(bytes.size())});
  }
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kSafetensorsPrefix);
  if (length > kLongestHeader) {
    fail_input({.file = file,
                .problem = "not a safetensors file",
                .expected = "a header of at most " + std::to_string(kLongestHeader) + " bytes",
                .found = std::to_string(length)});
  }
  if (length > bytes.size() - kSafetensorsPrefix) {
    fail_input({.file = file,
                .problem = "the file is truncated",
                .expected = "a header of " + std::to_string(length) + " bytes",
                .found = std::to_string(bytes.size() - kSafetensorsPrefix)});
  }
  return {reinterpret_cast<const char*>(bytes.data()) + kSafetensorsPrefix, length};
}

// The length of a header's text and the text.
std::string with_length(std::string_view text) {
  const std::uint64_t length = text.size();
  std::string out(reinterpret_cast<const char*>(&length), sizeof(length));
  return out.append(text);
}

TensorFileLayout layout_of(std::vector<TensorSpec> specs, const std::map<std::string, std::string>& metadata,
                           FilePermissions permissions) {
  const auto quoted = [](std::string_view text) {
    try {
      return nlohmann::json(text).dump();
    } catch (const nlohmann::json::exception&) {
      throw std::invalid_argument("a name in a safetensors header is not valid UTF-8");
    }
  };
  std::string header = R"({"__metadata__":{"format":"pt")";
  for (const auto& [key, value] : metadata) {
    if (key == "format") {
      throw std::invalid_argument(R"(the metadata "format" is always "pt")");
    }
    header += "," + quoted(key) + ":" + quoted(value);
  }
  header += "}";
  TensorFileLayout out;
  out.permissions = permissions;
  std::uint64_t end = 0;
  std::unordered_set<std::string> names;
  for (TensorSpec& spec : specs) {
    if (spec.name == kMetadata || !names.insert(spec.name).second) {
      throw std::invalid_argument("tensor name used twice or reserved: " + spec.name);
    }
    const std::uint64_t begin = end;
    if (__builtin_add_overflow(end, spec.bytes(), &end)) {
      throw std::invalid_argument("tensor " + spec.name + " ends beyond 2^64 bytes");
    }
    header += "," + quoted(spec.name) + R"(:{"dtype":")" + std::string(safetensors_name(spec.dtype)) +
              R"(","shape":[)";
    for (std::size_t i = 0; i < spec.shape.size(); ++i) {
      header += (i == 0 ? "" : ",") + std::to_string(spec.shape[i]);
    }
    header += R"(],"data_offsets":[)" + std::to_string(begin) + "," + std::to_string(end) + "]}";
    out.tensors.push_back({std::move(spec), begin});
  }
  header += "}";
  header.append((kSafetensorsPrefix - header.size() % kSafetensorsPrefix) % kSafetensorsPrefix, ' ');
  if (header.size() > kLongestHeader) {
    throw std::invalid_argument("the safetensors header would be longer than readers accept");
  }
  out.header = with_length(header);
  if (__builtin_add_overflow(std::uint64_t{out.header.size()}, end, &out.bytes)) {
    throw std::invalid_argument("the tensors end beyond 2^64 bytes");
  }
  for (TensorFileLayout::Place& tensor : out.tensors) {
    tensor.offset += out.header.size();
  }
  return out;
}

}  // namespace

SafetensorsHeader parse_safetensors_header(const std::filesystem::path& file, std::string_view text,
                                           std::uint64_t data_bytes) {
  // The JSON parser would skip a byte order mark and stop at a NUL.
  if (!text.starts_with('{')) {
    fail_input({.file = file,
                .problem = "not a safetensors file",
                .expected = "a header that begins with {",
                .found = text.empty() ? "an empty header" : "another byte"});
  }
  if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos) {
    fail_input({.file = file,
                .problem = "the safetensors header is not valid JSON",
                .found = "a NUL at byte " + std::to_string(nul + 1) + " of the header"});
  }
  HeaderReader reader(file);
  nlohmann::json::sax_parse(text, &reader);
  for (const Entry& entry : reader.entries) {
    check_entry(file, entry);
  }
  check_layout(file, reader.entries, data_bytes);

  SafetensorsHeader out;
  out.metadata = std::move(reader.metadata);
  out.tensors.reserve(reader.entries.size());
  for (Entry& entry : reader.entries) {
    out.tensors.push_back({.name = std::move(entry.name),
                           .dtype = entry.dtype,
                           .shape = std::move(entry.shape),
                           .offset = kSafetensorsPrefix + text.size() + entry.begin,
                           .bytes = entry.end - entry.begin});
  }
  return out;
}

void write_safetensors_header(PendingFile& file, std::string_view text) {
  file.write_at(0, std::as_bytes(std::span<const char>(with_length(text))));
}

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  SafetensorsFile result;
  result.file_ = MappedFile::open(path);
  const std::string_view text = header_of(path, result.file_.bytes());
  result.header_ =
      parse_safetensors_header(path, text, result.file_.bytes().size() - kSafetensorsPrefix - text.size());
  for (std::size_t i = 0; i < result.tensors().size(); ++i) {
    result.index_.emplace(result.tensors()[i].name, i);
  }
  return result;
}

std::string_view SafetensorsFile::header_text() const {
  return header_of(path(), file_.bytes());
}

const TensorInfo* SafetensorsFile::find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors()[found->second];
}

std::span<const std::byte> SafetensorsFile::bytes(const TensorInfo& tensor) const {
  const std::span<const std::byte> all = file_.bytes();
  if (tensor.offset > all.size() || tensor.bytes > all.size() - tensor.offset) {
    throw std::invalid_argument("tensor " + tensor.name + " is not one of " + path().string());
  }
  return all.subspan(tensor.offset, tensor.bytes);
}

FilePermissions common_permissions(std::span<const SafetensorsFile> files) {
  std::filesystem::perms all = std::filesystem::perms::all;
  for (const SafetensorsFile& file : files) {
    all &= *permissions_of(file.path());
  }
  return all;
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorSpec> specs,
                                     const std::map<std::string, std::string>& metadata,
                                     FilePermissions permissions)
    : TensorFileWriter(path, layout_of(std::move(specs), metadata, permissions)) {}

std::unique_ptr<SafetensorsWriter> SafetensorsWriter::reopen(const std::filesystem::path& path,
                                                             std::vector<TensorSpec> specs,
                                                             FilePermissions permissions) {
  TensorFileLayout layout = layout_of(std::move(specs), {}, permissions);
  std::optional<PendingFile> file = take_up(path, layout);
  // Not make_unique: the constructor is private.
  return file ? std::unique_ptr<SafetensorsWriter>(new SafetensorsWriter(std::move(*file), std::move(layout)))
              : nullptr;
}

void SafetensorsWriter::copy_slice(const std::string& name, const SafetensorsFile& source,
                                   const TensorInfo& tensor, const TensorSlice& slice) {
  Slot& slot = claim(name, tensor.dtype, shape_of(slice, tensor.shape));
  const SliceRuns runs = runs_of(slice, tensor.dtype, tensor.shape);
  if (runs.count == 1) {
    file().copy_at(slot.offset, source.path(), tensor.offset + runs.first, runs.length);
  } else {
    const std::span<const std::byte> bytes = source.bytes(tensor);
    for (std::uint64_t i = 0; i < runs.count; ++i) {
      file().write_at(slot.offset + i * runs.length,
                      bytes.subspan(runs.first + i * runs.stride, runs.length));
    }
    source.release(tensor);
  }
  wrote(slot);
}

}  // namespace relatent
