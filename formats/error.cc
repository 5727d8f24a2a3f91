#include "formats/error.h"

#include <cerrno>
#include <cstddef>
#include <system_error>

namespace relatent {
namespace {

// Names out of hostile files must neither break the line nor flood it.
constexpr std::size_t kLongestPart = 300;

std::string one_line(std::string_view text) {
  static constexpr std::string_view kDigits = "0123456789abcdef";
  std::string line;
  line.reserve(text.size());
  for (const char character : text) {
    const auto byte = static_cast<unsigned char>(character);
    if (character == '\n') {
      line += "\\n";
    } else if (byte < 0x20 || byte == 0x7f) {
      line += "\\x";
      line += kDigits[byte >> 4U];
      line += kDigits[byte & 0xfU];
    } else {
      line += character;
    }
  }
  return line;
}

std::string shortened(const std::string& text) {
  if (text.size() <= kLongestPart) {
    return text;
  }
  std::size_t end = kLongestPart;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0U) == 0x80U) {
    --end;  // not in the middle of a UTF-8 sequence
  }
  return text.substr(0, end) + "...";
}

void append_part(std::string& sentence, std::string_view separator, const std::string& part) {
  if (part.empty()) {
    return;
  }
  if (!sentence.empty()) {
    sentence += separator;
  }
  sentence += part;
}

}  // namespace

std::string to_sentence(const Complaint& complaint) {
  std::string sentence = complaint.file.string();
  if (!complaint.tensor.empty()) {
    append_part(sentence, ": ", "tensor " + shortened(complaint.tensor));
  }
  append_part(sentence, ": ", complaint.problem);
  if (!complaint.expected.empty()) {
    append_part(sentence, ": ", "expected " + shortened(complaint.expected));
  }
  if (!complaint.found.empty()) {
    append_part(sentence, complaint.expected.empty() ? ": " : ", ", "found " + shortened(complaint.found));
  }
  if (!complaint.next_step.empty()) {
    append_part(sentence, " ", "(" + complaint.next_step + ")");
  }
  return one_line(sentence);
}

void fail_input(const Complaint& complaint) {
  throw Error(ErrorKind::input, to_sentence(complaint));
}

void fail_usage(const std::string& sentence) {
  throw Error(ErrorKind::usage, one_line(sentence));
}

void fail_system(const std::filesystem::path& file, std::string_view problem, int error_number) {
  const bool about_the_input = error_number == ENOENT || error_number == ENOTDIR || error_number == EISDIR;
  const std::string sentence =
      file.string() + ": " + std::string(problem) + ": " + std::generic_category().message(error_number);
  throw Error(about_the_input ? ErrorKind::input : ErrorKind::machine, one_line(sentence));
}

std::string join_words(const std::vector<std::string>& words, std::string_view last) {
  std::string out;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const bool behind = i > 0 && i + 1 == words.size();
    out += behind ? " " + std::string(last) + " " : std::string(i > 0 ? ", " : "");
    out += words[i];
  }
  return out;
}

}  // namespace relatent
