// Where the output of a long run grows: a folder OUT.partial beside its place, with a journal (journal.h)
// from which a later run can go on after this one was killed or the machine let it down.
//
//   OUT.partial/journal     what the run was asked for and what is done
//   OUT.partial/output      the file or folder that becomes OUT
//   OUT.partial/...         what else the run keeps for the next one
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "formats/journal.h"

namespace relatent {

// What there may be under the output's name already.
enum class OutputKind {
  new_folder,  // nothing
  new_file,    // nothing
  file,        // a regular file, which is replaced
};

class WorkFolder {
 public:
  // Makes the folder, or with `resume` takes up the one that an unfinished run of the same facts left. Only
  // one process at a time has it. Throws Error: usage when the output may not be made (something is there
  // that its kind does not allow, its parent does not exist), when an unfinished run is in the way and
  // `resume` is not given, when what it was asked for differs from `facts` (naming what), or when another
  // process is writing; machine when the folder cannot be made. None of these changes anything.
  WorkFolder(const std::filesystem::path& path, OutputKind kind, const RunIdentity& facts, bool resume);
  WorkFolder(const WorkFolder&) = delete;
  WorkFolder& operator=(const WorkFolder&) = delete;
  // Removes an uncommitted folder unless run() decided to keep it.
  ~WorkFolder();

  // There was something to go on from.
  bool resumed() const { return resumed_; }
  // The output has its name already: nothing is left to do but commit(), which tidies up.
  bool complete() const { return complete_; }
  std::filesystem::path output() const { return folder_ / "output"; }
  std::filesystem::path file(const std::string& name) const { return folder_ / name; }
  const Journal& journal() const { return *journal_; }
  // Appends to the journal: worth keeping from now on.
  void record(std::string_view name, std::string_view value) { journal_->append(name, value); }
  void record(std::string_view name, std::int64_t number) { record(name, std::to_string(number)); }

  // Calls work. When the machine lets it down and the journal has entries, the folder outlives this object
  // and the error says that --resume goes on from it.
  void run(const std::function<void()>& work);

  // Renames the finished, flushed output into place and removes the rest. Throws Error: usage when the name
  // was taken in the meantime by what the output's kind does not allow, machine otherwise; the folder is kept
  // then.
  void commit();

 private:
  void take_up(const RunIdentity& facts);
  // "NAME.partial: PROBLEM (...)", usage.
  [[noreturn]] void refuse(const std::string& problem, const std::string& next_step) const;

  std::filesystem::path path_;
  std::filesystem::path folder_;
  OutputKind kind_;
  int lock_ = -1;
  std::unique_ptr<Journal> journal_;
  bool resumed_ = false;
  bool complete_ = false;
  bool kept_ = false;
};

}  // namespace relatent
