#include "formats/journal.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <system_error>

#include "formats/error.h"
#include "formats/files.h"
#include "formats/hash.h"

namespace relatent {
namespace {

constexpr std::string_view kFirstLine = "relatent journal 1";
constexpr std::string_view kFamily = "relatent journal ";
constexpr std::string_view kGiven = "given ";
constexpr std::string_view kBegun = "begun";
constexpr std::size_t kChecksumDigits = 32;
constexpr std::size_t kLongest = std::size_t{256} << 20U;
constexpr std::size_t kNamesTold = 3;

std::string escaped(std::string_view text) {
  std::string out;
  for (const char character : text) {
    switch (character) {
      case '\\':
        out += "\\\\";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\n':
        out += "\\n";
        break;
      default:
        out += character;
    }
  }
  return out;
}

std::string unescaped(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      out += text[i];
      continue;
    }
    ++i;
    out += text[i] == 't' ? '\t' : text[i] == 'n' ? '\n' : text[i];
  }
  return out;
}

std::string pair_text(std::string_view name, std::string_view value) {
  return escaped(name) + "\t" + escaped(value);
}

std::optional<std::pair<std::string, std::string>> parse_pair(std::string_view text) {
  const std::size_t tab = text.find('\t');
  if (tab == std::string_view::npos) {
    return std::nullopt;
  }
  return std::pair(unescaped(text.substr(0, tab)), unescaped(text.substr(tab + 1)));
}

std::string chained(const std::string& before, std::string_view line) {
  Hasher hasher;
  hasher.add_text(before);
  hasher.add_text(line);
  return hasher.hexadecimal();
}

// Takes the next line, without its end, off the front of the text; nothing when the end is missing.
std::optional<std::string_view> take_line(std::string_view& text) {
  const std::size_t end = text.find('\n');
  if (end == std::string_view::npos) {
    return std::nullopt;
  }
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(end + 1);
  return line;
}

// The text of a line whose checksum follows from the one before, which it replaces.
std::optional<std::string_view> take_checked(std::string_view& text, std::string& checksum) {
  const std::optional<std::string_view> line = take_line(text);
  if (!line || line->size() <= kChecksumDigits || (*line)[kChecksumDigits] != ' ') {
    return std::nullopt;
  }
  const std::string_view body = line->substr(kChecksumDigits + 1);
  std::string expected = chained(checksum, body);
  if (line->substr(0, kChecksumDigits) != expected) {
    return std::nullopt;
  }
  checksum = std::move(expected);
  return body;
}

const std::string* find(const RunIdentity& facts, const std::string& name) {
  const auto found =
      std::find_if(facts.begin(), facts.end(), [&](const auto& fact) { return fact.first == name; });
  return found == facts.end() ? nullptr : &found->second;
}

}  // namespace

std::string difference(const RunIdentity& before, const RunIdentity& now) {
  if (before == now) {  // also where a name is in them twice
    return "";
  }
  std::vector<std::string> names;
  for (const auto& [name, value] : before) {
    const std::string* other = find(now, name);
    if (other == nullptr || *other != value) {
      names.push_back(name);
    }
  }
  for (const auto& [name, value] : now) {
    if (find(before, name) == nullptr) {
      names.push_back(name);
    }
  }
  std::string out;
  for (std::size_t i = 0; i < std::min(names.size(), kNamesTold); ++i) {
    const std::string* old_value = find(before, names[i]);
    const std::string* new_value = find(now, names[i]);
    out += (i == 0 ? "" : ", ") + names[i] + " was " + (old_value == nullptr ? "not there" : *old_value) +
           " and is " + (new_value == nullptr ? "not there" : *new_value) + " now";
  }
  if (names.size() > kNamesTold) {
    out += ", and " + std::to_string(names.size() - kNamesTold) + " more";
  }
  return out;
}

Journal Journal::create(const std::filesystem::path& path, const RunIdentity& given) {
  std::string text(kFirstLine);
  text += '\n';
  std::string checksum;
  const auto add = [&](const std::string& line) {
    checksum = chained(checksum, line);
    text += checksum + " " + line + "\n";
  };
  for (const auto& [name, value] : given) {
    add(std::string(kGiven) + pair_text(name, value));
  }
  add(std::string(kBegun));
  write_text(path, text);
  return open(path);
}

Journal Journal::open(const std::filesystem::path& path) {
  const std::string whole = read_text(path, kLongest);
  std::string_view rest = whole;
  const std::optional<std::string_view> first = take_line(rest);
  if (!first || *first != kFirstLine) {
    const bool other = first && first->starts_with(kFamily);
    fail_input({.file = path,
                .problem = other ? "a journal of another version of the program" : "not a journal",
                .expected = "\"" + std::string(kFirstLine) + "\"",
                .found = other ? "\"" + std::string(*first) + "\"" : "something else"});
  }
  Journal out(path);
  bool begun = false;
  out.end_ = whole.size() - rest.size();
  std::string checksum;
  while (const std::optional<std::string_view> line = take_checked(rest, checksum)) {
    if (!begun && *line == kBegun) {
      begun = true;
    } else {
      if (!begun && !line->starts_with(kGiven)) {
        break;
      }
      const std::optional<std::pair<std::string, std::string>> pair =
          parse_pair(begun ? *line : line->substr(kGiven.size()));
      if (!pair) {
        break;
      }
      (begun ? out.entries_ : out.given_).push_back(*pair);
    }
    // Only now: what is appended next must follow what is read again.
    out.end_ = whole.size() - rest.size();
    out.checksum_ = checksum;
  }
  if (!begun) {
    fail_input({.file = path, .problem = "the beginning of the journal is damaged"});
  }
  out.fd_ = ::open(path.c_str(), O_WRONLY | O_NOFOLLOW | O_CLOEXEC);
  if (out.fd_ < 0) {
    fail_system(path, "cannot open", errno);
  }
  if (out.end_ < whole.size() && ::ftruncate(out.fd_, static_cast<off_t>(out.end_)) != 0) {
    fail_system(path, "cannot cut off a torn line", errno);
  }
  return out;
}

Journal::Journal(Journal&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      end_(other.end_),
      checksum_(std::move(other.checksum_)),
      given_(std::move(other.given_)),
      entries_(std::move(other.entries_)) {}

Journal::~Journal() {
  if (fd_ >= 0) {
    ::close(fd_);
  }
}

std::optional<std::string> Journal::last(std::string_view name) const {
  const auto found = std::find_if(entries_.rbegin(), entries_.rend(),
                                  [&](const auto& entry) { return entry.first == name; });
  return found == entries_.rend() ? std::nullopt : std::optional(found->second);
}

std::int64_t Journal::last_number(std::string_view name) const {
  const std::string text = last(name).value_or("");
  std::int64_t out = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), out);
  return status == std::errc() && end == text.data() + text.size() ? std::max<std::int64_t>(out, 0) : 0;
}

void Journal::append(std::string_view name, std::string_view value) {
  const std::string line = pair_text(name, value);
  std::string checksum = chained(checksum_, line);
  const std::string text = checksum + " " + line + "\n";
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t put =
        ::pwrite(fd_, text.data() + done, text.size() - done, static_cast<off_t>(end_ + done));
    if (put < 0) {
      if (errno == EINTR) {
        continue;
      }
      throw Error(
          ErrorKind::machine,
          to_sentence({.file = path_, .problem = "cannot write: " + std::generic_category().message(errno)}));
    }
    done += static_cast<std::size_t>(put);
  }
  if (::fdatasync(fd_) != 0) {
    throw Error(
        ErrorKind::machine,
        to_sentence({.file = path_, .problem = "cannot flush: " + std::generic_category().message(errno)}));
  }
  end_ += text.size();
  checksum_ = std::move(checksum);
  entries_.emplace_back(name, value);
}

}  // namespace relatent
