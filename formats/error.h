// The one error type people see: a sentence and an exit code.
#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace relatent {

enum class ErrorKind {
  usage = 2,    // the command line makes no sense, whatever the files hold
  input = 3,    // a file is not what it should be
  machine = 4,  // the machine let us down: disk full, unreadable, out of memory
};

// An error with everything its reader needs on one line. Library code throws it; only main ends the process.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& sentence) : std::runtime_error(sentence), kind_(kind) {}
  ErrorKind kind() const { return kind_; }
  int exit_code() const { return static_cast<int>(kind_); }

 private:
  ErrorKind kind_;
};

// The parts of a complaint about a file. Empty parts are left out of the sentence, which reads
//   FILE: tensor NAME: PROBLEM: expected EXPECTED, found FOUND (NEXT STEP)
struct Complaint {
  // The initialisers let a caller name only the parts it has.
  std::filesystem::path file = {};
  std::string tensor = {};
  std::string problem = {};
  std::string expected = {};
  std::string found = {};
  std::string next_step = {};
};

std::string to_sentence(const Complaint& complaint);
[[noreturn]] void fail_input(const Complaint& complaint);
[[noreturn]] void fail_usage(const std::string& sentence);
// "FILE: PROBLEM: <text of error_number>", kind machine; ENOENT, ENOTDIR, EISDIR become kind input.
[[noreturn]] void fail_system(const std::filesystem::path& file, std::string_view problem, int error_number);

// "a, b and c"
std::string join_words(const std::vector<std::string>& words, std::string_view last = "and");

}  // namespace relatent
