#include "formats/work_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <system_error>

#include "formats/error.h"
#include "formats/files.h"

namespace relatent {
namespace {

constexpr const char* kJournalName = "journal";
constexpr std::string_view kComplete = "complete";

[[noreturn]] void fail_machine(const std::filesystem::path& path, const std::string& problem,
                               int error_number) {
  throw Error(
      ErrorKind::machine,
      to_sentence({.file = path, .problem = problem + ": " + std::generic_category().message(error_number)}));
}

bool is_there(const std::filesystem::path& path) {
  struct stat status {};
  return ::lstat(path.c_str(), &status) == 0;
}

// Makes the folder unless it is one already, and not a link to one elsewhere.
void make_folder(const std::filesystem::path& path) {
  if (::mkdir(path.c_str(), 0777) == 0) {
    return;
  }
  if (errno != EEXIST) {
    fail_machine(path, "cannot create the folder", errno);
  }
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0 || !S_ISDIR(status.st_mode)) {
    fail_usage(path.string() + ": is in the way of a folder (delete it and try again)");
  }
}

}  // namespace

WorkFolder::WorkFolder(const std::filesystem::path& path, OutputKind kind, const RunIdentity& facts,
                       bool resume)
    : path_(output_name(path)), folder_(path_), kind_(kind) {
  folder_ += ".partial";
  // A run that ended between the rename and the removal of its folder is to be tidied up after.
  const bool may_be_done = resume && is_there(folder_ / kJournalName) && !is_there(output());
  if (kind_ != OutputKind::file && !may_be_done) {
    if (is_there(path_)) {
      // A run that ended between the removal of its journal and of its folder left it empty. Removes no
      // other.
      ::rmdir(folder_.c_str());
    }
    require_absent(path_);
  }
  if (kind_ == OutputKind::file) {
    require_replaceable(path_);
  }
  const bool left_over = ::mkdir(folder_.c_str(), 0777) != 0;
  if (left_over && errno != EEXIST) {
    fail_machine(folder_, "cannot create the folder", errno);
  }
  lock_ = ::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (lock_ < 0) {
    refuse("is in the way", "delete it and try again");
  }
  bool locked = false;
  try {
    // Filesystems without locks are no reason to stop.
    if (::flock(lock_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      refuse("another run is writing there", "wait for it, or choose another name");
    }
    locked = true;
    // As a run leaves it that ended between making the folder and the journal, or while it tidied up.
    const bool bare = std::filesystem::is_empty(folder_);
    if (left_over && !resume && !bare) {
      refuse("is left over from an interrupted run", "continue it with --resume, or delete it and try again");
    }
    if (is_there(folder_ / kJournalName)) {
      take_up(facts);
    } else {
      if (left_over) {
        // A run that ended before it had a journal left nothing else than these.
        for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
          const std::string name = entry.path().filename().string();
          if (name != std::string(kJournalName) + ".partial" &&
              (name != "output" || !std::filesystem::is_empty(entry.path()))) {
            refuse("holds " + name + " and no journal, so that it cannot be continued",
                   "delete it and try again");
          }
        }
      }
      if (kind_ == OutputKind::new_folder) {
        make_folder(output());
      }
      journal_ = std::make_unique<Journal>(Journal::create(folder_ / kJournalName, facts));
      flush_folder(parent_of(folder_));
    }
  } catch (...) {
    ::close(lock_);
    journal_.reset();  // removing folders takes descriptors, of which there may be no more
    if (!left_over && locked) {
      std::error_code ignored;
      std::filesystem::remove_all(folder_, ignored);
    }
    throw;
  }
}

void WorkFolder::take_up(const RunIdentity& facts) {
  try {
    journal_ = std::make_unique<Journal>(Journal::open(folder_ / kJournalName));
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::input) {
      throw;
    }
    fail_usage(std::string(error.what()) + ", so that the run cannot be continued (delete " +
               folder_.string() + " and try again)");
  }
  const std::string differs = difference(journal_->given(), facts);
  if (!differs.empty()) {
    refuse("cannot be continued by this command: " + differs,
           "repeat the command that began it, or delete the folder and try again");
  }
  // What did not get its name lay here unguarded since: it is looked at again as all of an unfinished run is.
  complete_ = journal_->last(kComplete).has_value() && !is_there(output()) && is_there(path_);
  if (!complete_ && kind_ != OutputKind::file) {
    require_absent(path_);
  }
  if (!complete_ && kind_ == OutputKind::new_folder) {
    make_folder(output());
  }
  resumed_ = !journal_->entries().empty();
}

WorkFolder::~WorkFolder() {
  if (lock_ < 0) {
    return;
  }
  journal_.reset();  // removing folders takes descriptors, of which there may be no more
  if (!kept_) {
    // The journal goes last: with it, a run that ends in the middle of this can be tidied up after.
    std::error_code ignored;
    std::filesystem::directory_iterator entry(folder_, ignored);
    for (; !ignored && entry != std::filesystem::directory_iterator(); entry.increment(ignored)) {
      if (entry->path().filename() != kJournalName) {
        std::error_code stays;
        std::filesystem::remove_all(entry->path(), stays);
      }
    }
    std::filesystem::remove_all(folder_, ignored);
  }
  ::close(lock_);
}

void WorkFolder::refuse(const std::string& problem, const std::string& next_step) const {
  fail_usage(folder_.string() + ": " + problem + " (" + next_step + ")");
}

void WorkFolder::run(const std::function<void()>& work) {
  const auto keep = [this](const std::string& sentence) {
    if (journal_->entries().empty()) {
      throw Error(ErrorKind::machine, sentence);
    }
    kept_ = true;
    throw Error(ErrorKind::machine,
                sentence + " (what is done is kept in " + folder_.string() +
                    "; after making room or mending what is wrong, the same command with --resume "
                    "continues)");
  };
  try {
    work();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::machine) {
      throw;
    }
    keep(error.what());
  } catch (const std::bad_alloc&) {
    keep("out of memory");
  } catch (const std::filesystem::filesystem_error& error) {
    keep(error.what());
  }
}

void WorkFolder::commit() {
  kept_ = true;
  if (!complete_) {
    record(kComplete, "");
    if (kind_ == OutputKind::new_folder) {
      rename_new_folder(output(), path_);
    } else {
      if (kind_ == OutputKind::new_file) {
        require_absent(path_);
      } else {
        require_replaceable(path_);
      }
      if (::rename(output().c_str(), path_.c_str()) != 0) {
        fail_machine(path_, "cannot rename the finished file into place", errno);
      }
      flush_folder(parent_of(path_));
    }
    complete_ = true;
  }
  flush_folder(folder_);
  kept_ = false;  // the destructor removes what is left
}

}  // namespace relatent
