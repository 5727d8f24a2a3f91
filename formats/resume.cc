#include "formats/resume.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "formats/file_identity.h"
#include "formats/hash.h"

namespace relatent {
namespace {

// A save takes at most one part in so many of the time.
constexpr int save_share = 10;

std::string hashed(std::string_view text) {
  Hasher hasher;
  hasher.add_text(text);
  return hasher.hexadecimal();
}

}  // namespace

std::string exact_text(double number) {
  std::array<char, 64> out{};
  const auto [end, status] = std::to_chars(out.data(), out.data() + out.size(), number);
  return {out.data(), end};
}

RunIdentity program_identity() {
  return {{"the program", "relatent " RELATENT_VERSION}};
}

void add_source_identity(const Checkpoint& source, RunIdentity& facts) {
  source.require_unchanged();
  const auto add = [&](const std::filesystem::path& path, const std::string& more) {
    facts.emplace_back("the source's " + path.filename().string(), file_identity(path) + more);
  };
  add(source.config_path(), ", " + hashed(source.config().dump()));
  if (source.index_path()) {
    add(*source.index_path(), "");
  }
  std::set<std::filesystem::path> shards;
  for (const std::string& name : source.tensor_names()) {
    const SafetensorsFile& file = source.file_of(name);
    if (shards.insert(file.path()).second) {
      add(file.path(), ", header " + hashed(file.header_text()));
    }
  }
  for (const std::filesystem::path& path : source.linked_side_files()) {
    add(path, "");
  }
}

void require_unchanged(const RunIdentity& before, const RunIdentity& now) {
  std::map<std::string, std::string> values(before.begin(), before.end());
  RunIdentity then;
  RunIdentity named;
  for (const auto& fact : now) {
    if (const auto found = values.find(fact.first); found != values.end()) {
      then.emplace_back(*found);
      named.push_back(fact);
    }
  }
  if (const std::string differs = difference(then, named); !differs.empty()) {
    fail_changed(differs);
  }
}

bool SaveClock::due() const {
  const Clock::duration since = Clock::now() - last_;
  return every_ <= 0 || (since >= std::chrono::duration<double>(every_) && since >= save_share * took_);
}

}  // namespace relatent
