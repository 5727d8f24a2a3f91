#include "formats/npy.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "formats/error.h"
#include "formats/mapped_file.h"

namespace relatent {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::size_t kLongestHeader = 65536;

struct NpyHeader {
  std::optional<std::string> descr;
  std::optional<bool> fortran_order;
  std::optional<std::vector<std::uint64_t>> shape;
};

// Reads the Python dictionary of an npy header: no more of the language than NumPy writes there.
class NpyHeaderParser {
 public:
  NpyHeaderParser(const std::filesystem::path& file, std::string_view text) : file_(file), text_(text) {}

  NpyHeader parse() {
    NpyHeader header;
    require('{');
    while (!accept('}')) {
      read_member(header);
      if (!accept(',')) {
        require('}');
        break;
      }
    }
    skip_space();
    if (at_ != text_.size()) {
      fail("nothing after the dictionary");
    }
    if (!header.descr || !header.fortran_order || !header.shape) {
      fail("descr, fortran_order and shape");
    }
    return header;
  }

 private:
  void read_member(NpyHeader& header) {
    const std::string key = read_string();
    require(':');
    if (key == "descr" && !header.descr) {
      header.descr = read_string();
    } else if (key == "fortran_order" && !header.fortran_order) {
      header.fortran_order = read_bool();
    } else if (key == "shape" && !header.shape) {
      header.shape = read_tuple();
    } else {
      fail("descr, fortran_order and shape once each");
    }
  }

  std::string read_string() {
    skip_space();
    const char quote = at_ < text_.size() ? text_[at_] : '\0';
    if (quote != '\'' && quote != '"') {
      fail("a quoted string");
    }
    const std::size_t end = text_.find(quote, at_ + 1);
    if (end == std::string_view::npos) {
      fail("a closing quote");
    }
    std::string value(text_.substr(at_ + 1, end - at_ - 1));
    at_ = end + 1;
    return value;
  }

  bool read_bool() {
    skip_space();
    const std::string_view rest = text_.substr(at_);
    const bool value = rest.starts_with("True");
    if (!value && !rest.starts_with("False")) {
      fail("True or False");
    }
    at_ += value ? 4 : 5;
    return value;
  }

  std::vector<std::uint64_t> read_tuple() {
    std::vector<std::uint64_t> values;
    require('(');
    while (!accept(')')) {
      values.push_back(read_number());
      if (!accept(',')) {
        require(')');
        break;
      }
    }
    return values;
  }

  std::uint64_t read_number() {
    skip_space();
    const std::size_t begin = at_;
    std::uint64_t value = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      const auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
      if (__builtin_mul_overflow(value, 10U, &value) || __builtin_add_overflow(value, digit, &value)) {
        fail("a dimension below 2^64");
      }
      ++at_;
    }
    if (at_ == begin) {
      fail("a non-negative integer");
    }
    return value;
  }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t')) {
      ++at_;
    }
  }

  bool accept(char character) {
    skip_space();
    if (at_ < text_.size() && text_[at_] == character) {
      ++at_;
      return true;
    }
    return false;
  }

  void require(char character) {
    if (!accept(character)) {
      fail(std::string("'") + character + "'");
    }
  }

  [[noreturn]] void fail(const std::string& expected) const {
    fail_input({.file = file_,
                .problem = "the npy header is damaged",
                .expected = expected,
                .found = "something else at byte " + std::to_string(at_) + " of the header"});
  }

  const std::filesystem::path& file_;
  std::string_view text_;
  std::size_t at_ = 0;
};

std::uint64_t little_endian(std::span<const std::byte> bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = bytes.size(); i-- > 0;) {
    value = (value << 8U) | std::to_integer<std::uint64_t>(bytes[i]);
  }
  return value;
}

// A validated token file; ids are checked when they are taken.
class TokenFile {
 public:
  explicit TokenFile(const std::filesystem::path& path) : file_(MappedFile::open(path)) {
    const std::span<const std::byte> bytes = file_.bytes();
    if (bytes.size() < kMagic.size() || std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
      fail_input({.file = path,
                  .problem = "not a NumPy file",
                  .expected = "\\x93NUMPY at its beginning",
                  .found = bytes.size() < kMagic.size() ? std::to_string(bytes.size()) + " bytes"
                                                        : std::string("other bytes")});
    }
    if (bytes.size() < kMagic.size() + 2) {
      fail_truncated(kMagic.size() + 2);
    }
    const auto major = std::to_integer<unsigned>(bytes[kMagic.size()]);
    const auto minor = std::to_integer<unsigned>(bytes[kMagic.size() + 1]);
    if (major < 1 || major > 3 || minor != 0) {
      fail_input({.file = path,
                  .problem = "npy format version",
                  .expected = "1.0, 2.0 or 3.0",
                  .found = std::to_string(major) + "." + std::to_string(minor)});
    }
    const std::size_t length_bytes = major == 1 ? 2 : 4;
    const std::size_t header_begin = kMagic.size() + 2 + length_bytes;
    if (bytes.size() < header_begin) {
      fail_truncated(header_begin);
    }
    const std::uint64_t header_bytes = little_endian(bytes.subspan(kMagic.size() + 2, length_bytes));
    if (header_bytes > kLongestHeader) {
      fail_input({.file = path,
                  .problem = "the npy header is too long",
                  .expected = "at most " + std::to_string(kLongestHeader) + " bytes",
                  .found = std::to_string(header_bytes)});
    }
    if (bytes.size() - header_begin < header_bytes) {
      fail_truncated(header_begin + header_bytes);
    }
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + header_begin, header_bytes);
    interpret(NpyHeaderParser(path, text).parse(), bytes.subspan(header_begin + header_bytes));
  }

  std::uint64_t count() const { return data_.size() / item_bytes_; }

  // The first `wanted` ids. Throws Error (input) on one that is negative or not below `limit`.
  std::vector<std::int32_t> take(std::uint64_t wanted, std::uint64_t limit) const {
    std::vector<std::int32_t> tokens;
    tokens.reserve(wanted);
    for (std::uint64_t i = 0; i < wanted; ++i) {
      const std::int64_t id = id_at(i);
      if (id < 0 || static_cast<std::uint64_t>(id) >= limit) {
        fail_input({.file = file_.path(),
                    .problem = "token id at index " + std::to_string(i),
                    .expected = "an id from 0 to " + std::to_string(limit - 1),
                    .found = std::to_string(id)});
      }
      tokens.push_back(static_cast<std::int32_t>(id));
    }
    return tokens;
  }

 private:
  void interpret(const NpyHeader& header, std::span<const std::byte> data) {
    if (*header.descr == "<u2") {
      item_bytes_ = 2;
    } else if (*header.descr == "<i4") {
      item_bytes_ = 4;
    } else if (*header.descr == "<i8") {
      item_bytes_ = 8;
    } else {
      fail_input({.file = file_.path(),
                  .problem = "dtype of the tokens",
                  .expected = "<u2, <i4 or <i8",
                  .found = *header.descr,
                  .next_step = "save them with numpy.save(path, tokens.astype('<i4'))"});
    }
    if (header.shape->size() != 1) {
      fail_input({.file = file_.path(),
                  .problem = "shape of the tokens",
                  .expected = "one dimension",
                  .found = std::to_string(header.shape->size()) +
                           (*header.fortran_order ? " in Fortran order" : "")});
    }
    const std::uint64_t elements = header.shape->front();
    if (elements == 0) {
      fail_input({.file = file_.path(), .problem = "holds no tokens"});
    }
    if (data.size() % item_bytes_ != 0 || data.size() / item_bytes_ != elements) {
      fail_input(
          {.file = file_.path(),
           .problem =
               data.size() / item_bytes_ < elements ? "the file is truncated" : "bytes after the last token",
           .expected = std::to_string(elements) + " elements of " + std::to_string(item_bytes_) + " bytes",
           .found = std::to_string(data.size()) + " bytes of data"});
    }
    data_ = data;
  }

  std::int64_t id_at(std::uint64_t index) const {
    const std::byte* from = data_.data() + index * item_bytes_;
    if (item_bytes_ == 2) {
      std::uint16_t value = 0;
      std::memcpy(&value, from, sizeof value);
      return value;
    }
    if (item_bytes_ == 4) {
      std::int32_t value = 0;
      std::memcpy(&value, from, sizeof value);
      return value;
    }
    std::int64_t value = 0;
    std::memcpy(&value, from, sizeof value);
    return value;
  }

  [[noreturn]] void fail_truncated(std::uint64_t needed) const {
    fail_input({.file = file_.path(),
                .problem = "the file is truncated",
                .expected = "at least " + std::to_string(needed) + " bytes",
                .found = std::to_string(file_.bytes().size())});
  }

  MappedFile file_;
  std::span<const std::byte> data_;
  std::size_t item_bytes_ = 1;
};

constexpr std::uint64_t kIdLimit = std::uint64_t{1} << 31U;  // ids are kept in 32 bits with a sign

}  // namespace

std::vector<std::int32_t> read_tokens(const std::filesystem::path& path) {
  const TokenFile file(path);
  return file.take(file.count(), kIdLimit);
}

Sequences first_sequences(Sequences sequences, std::int64_t count) {
  if (count > 0 && count < sequences.count) {
    sequences.count = count;
    sequences.tokens.resize(static_cast<std::size_t>(count * sequences.length));
  }
  return sequences;
}

Sequences last_sequences(const Sequences& sequences, std::int64_t count) {
  Sequences out;
  out.count = count;
  out.length = sequences.length;
  out.tokens.assign(sequences.tokens.end() - count * sequences.length, sequences.tokens.end());
  return out;
}

Sequences read_sequences(const std::filesystem::path& path, std::int64_t length, std::int64_t count,
                         std::int64_t vocab_size) {
  if (length < 2) {
    fail_usage("a sequence needs at least 2 tokens, not " + std::to_string(length));
  }
  if (count < 0) {
    fail_usage("the number of sequences cannot be negative, as " + std::to_string(count) + " is");
  }
  if (vocab_size < 1) {
    fail_usage("the vocabulary needs at least 1 token, not " + std::to_string(vocab_size));
  }
  const TokenFile file(path);
  const auto fitting = static_cast<std::int64_t>(file.count() / static_cast<std::uint64_t>(length));
  if (fitting == 0 || count > fitting) {
    fail_usage(path.string() + ": holds " + std::to_string(file.count()) + " tokens, in which " +
               std::to_string(fitting) + " sequences of " + std::to_string(length) + " tokens fit, not " +
               std::to_string(count == 0 ? 1 : count));
  }
  Sequences sequences{.count = count == 0 ? fitting : count, .length = length, .tokens = {}};
  sequences.tokens =
      file.take(static_cast<std::uint64_t>(sequences.count) * static_cast<std::uint64_t>(length),
                std::min(kIdLimit, static_cast<std::uint64_t>(vocab_size)));
  return sequences;
}

void write_float_array(PendingFile& file, const std::vector<std::int64_t>& shape,
                       const std::function<std::vector<float>(std::int64_t)>& slice) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (const std::int64_t size : shape) {
    header += std::to_string(size) + ", ";
  }
  header += "), }";
  // Magic, version and length take ten bytes; NumPy pads so that the data is aligned to 64.
  constexpr std::size_t preamble = 10;
  constexpr std::size_t alignment = 64;
  header.append(alignment - 1 - (preamble + header.size()) % alignment, ' ');
  header += '\n';
  std::string start = "\x93NUMPY";
  start += {1, 0, static_cast<char>(header.size() & 0xFFU), static_cast<char>(header.size() >> 8U)};
  start += header;
  file.write_at(0, std::as_bytes(std::span(start)));
  std::uint64_t offset = start.size();
  for (std::int64_t i = 0; i < shape.at(0); ++i) {
    const std::vector<float> values = slice(i);
    file.write_at(offset, std::as_bytes(std::span(values)));
    offset += values.size() * sizeof(float);
  }
  file.commit();
}

}  // namespace relatent
