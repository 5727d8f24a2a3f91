// Files as the operating system sees them: atomic appearance, copying without decoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace relatent {

// Whether this names a file of a folder and nothing outside of it: not empty, not "." or "..", no '/' or NUL.
bool is_plain_name(std::string_view name);

// Who may do what with a file: bits of owner, group and others; nothing for what the umask leaves of reading
// and writing.
using FilePermissions = std::optional<std::filesystem::perms>;

// Of a file that another is made from, without setuid, setgid and the sticky bit. Throws Error as
// fail_system.
FilePermissions permissions_of(const std::filesystem::path& path);

// Reads a small text file whole. Throws Error; input when it is larger than max_bytes.
std::string read_text(const std::filesystem::path& path, std::size_t max_bytes);

// A file that is written under PATH + ".partial" and gets its own name only by commit(), which flushes it to
// the disk first. Without commit the partial file is removed by the destructor. One object at a time, of all
// processes, has the partial file: it is locked, where the filesystem has locks.
class PendingFile {
 public:
  // Throws Error: usage when there is anything but a regular file at path (require_replaceable) or its
  // partial name, or when another run is writing there, machine when the file cannot be created. An existing
  // file at path is replaced at commit.
  // Until commit only its owner can do anything with a file whose permissions are given.
  explicit PendingFile(std::filesystem::path path, FilePermissions permissions = {});
  // Takes up the partial file that an earlier process kept, as it is. Throws Error: input when there is none,
  // usage as above, machine when it cannot be opened.
  static PendingFile reopen(std::filesystem::path path, FilePermissions permissions = {});
  PendingFile(PendingFile&& other) noexcept;
  PendingFile& operator=(PendingFile&&) = delete;
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;
  ~PendingFile();

  // Sets the length of the file, reserving its blocks, so that a full disk is met here and not half way.
  void reserve(std::uint64_t size);
  // Throws Error (machine), as the two below do; for bytes of a MappedFile that was cut it names that file.
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  // Copies size bytes of another file into place, inside the kernel where it can.
  void copy_at(std::uint64_t offset, const std::filesystem::path& source, std::uint64_t source_offset,
               std::uint64_t size);
  // What was written so far is on the disk when this returns, under the name it has now.
  void flush();
  // From now on the partial file outlives an object that is not committed.
  void keep() { kept_ = true; }
  // Throws Error: usage when something else than a regular file has appeared at path, machine otherwise.
  void commit();
  const std::filesystem::path& path() const { return path_; }
  // Where the bytes are until commit.
  std::filesystem::path partial_path() const;

 private:
  enum class Start { empty, as_kept };
  PendingFile(std::filesystem::path path, FilePermissions permissions, Start start);

  std::filesystem::path path_;
  FilePermissions permissions_;
  int fd_ = -1;
  bool kept_ = false;
};

// The name without the slashes at its end that shells complete folders with. Throws Error (usage) when that
// is nothing, or when its parent folder does not exist.
std::filesystem::path output_name(const std::filesystem::path& path);
// Throws Error (usage) when there is anything but a regular file at path. A symbolic link is none, whatever
// it leads to.
void require_replaceable(const std::filesystem::path& path);
// Throws Error (usage) when there is anything at path.
void require_absent(const std::filesystem::path& path);
// Renames a finished folder into place and flushes the parent; never replaces anything. Throws Error: usage
// when something appeared at path in the meantime, machine otherwise.
void rename_new_folder(const std::filesystem::path& staging, const std::filesystem::path& path);
// The paths of all entries of a folder, sorted. Throws Error (input when there is no such folder, machine
// otherwise).
std::vector<std::filesystem::path> entries_of(const std::filesystem::path& folder);
// Makes a rename or a new entry of the folder survive a power cut. Throws Error (machine).
void flush_folder(const std::filesystem::path& folder);
std::filesystem::path parent_of(const std::filesystem::path& path);  // "." for a bare name

// Writes a small file through PendingFile.
void write_text(const std::filesystem::path& path, std::string_view text, FilePermissions permissions = {});

// Copies a whole file through PendingFile, without decoding it, with its permissions.
void copy_whole_file(const std::filesystem::path& source, const std::filesystem::path& target);

// A folder that is filled under NAME + ".partial" beside its place and gets its name only by commit(). The
// destructor removes the partial folder of an uncommitted one.
class PendingFolder {
 public:
  // Throws Error: usage when path exists already (any kind of file), when its parent folder does not exist,
  // or when NAME.partial is left over from an interrupted run (the sentence says to delete it); machine when
  // it cannot be made.
  explicit PendingFolder(const std::filesystem::path& path);
  PendingFolder(const PendingFolder&) = delete;
  PendingFolder& operator=(const PendingFolder&) = delete;
  ~PendingFolder();

  // Where files go until commit.
  const std::filesystem::path& staging() const { return staging_; }
  // Flushes the folder and renames it into place; never replaces anything (renameat2 with RENAME_NOREPLACE).
  void commit();

 private:
  std::filesystem::path path_;
  std::filesystem::path staging_;
  bool committed_ = false;
};

}  // namespace relatent
