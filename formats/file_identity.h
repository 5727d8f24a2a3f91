// Whether a file is still the one that was read.
#pragma once

#include <filesystem>
#include <map>
#include <string>

namespace relatent {

// Size and time of last change: "123 bytes, changed 1700000000.123456789". Of a file that changed just now it
// waits until a further change would get another time: a system's clock for files may stand still for 10 ms.
// Throws Error (input, machine).
std::string file_identity(const std::filesystem::path& path);

// Files as they were before they were read.
class ReadFiles {
 public:
  // To be called before the file is read; does nothing for one that is not there.
  void note(const std::filesystem::path& path);
  // Throws Error (input) when a noted file is not as it was: what was read of it may be of two minds.
  void require_unchanged() const;

 private:
  std::map<std::filesystem::path, std::string> identities_;
};

// Throws Error (input) about a file that changed. differs: which, how it was and how it is.
[[noreturn]] void fail_changed(const std::string& differs);

}  // namespace relatent
