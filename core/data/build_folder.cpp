#include "core/data/build_folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <string_view>

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/data/build_journal.h"
#include "core/data/data_file.h"
#include "core/data/token_dataset_formats.h"

namespace dstrain {
namespace {

namespace fs = std::filesystem;

bool starts_with(const std::string& text, std::string_view start) {
  return text.compare(0, start.size(), start) == 0;
}

// write_file_atomic() leaves one behind when it is killed.
bool is_temporary_file(const std::string& name) {
  return starts_with(name, kManifestFile + std::string(".tmp-")) ||
         starts_with(name, kProgressFile + std::string(".tmp-"));
}

bool is_dataset_file(const std::string& name) {
  return name == kIndexFile || name == kDocumentsFile || name == kManifestFile ||
         name == kProgressFile || is_temporary_file(name) ||
         (starts_with(name, "tokens-") && fs::path(name).extension() == ".bin");
}

void remove_files(const std::string& folder, bool (*chosen)(const std::string& name)) {
  for (const auto& entry : fs::directory_iterator(folder))
    if (chosen(entry.path().filename().string())) fs::remove(entry.path());
}

File make_folder(const std::string& path) {
  create_folders(path);
  return File::open_folder(path);
}

}  // namespace

BuildFolder::BuildFolder(const std::string& path) : folder_(make_folder(path)) {
  if (::flock(folder_.fd(), LOCK_EX | LOCK_NB) != 0 || !is_still_here())
    throw UsageError(
        fmt::format("another 'data build' is writing to '{}'; wait until it is done", path));
  remove_files(path, is_temporary_file);
}

// False if another build renamed the folder between its opening and its locking.
bool BuildFolder::is_still_here() const {
  struct stat opened, named;
  return ::fstat(folder_.fd(), &opened) == 0 && ::stat(path().c_str(), &named) == 0 &&
         opened.st_ino == named.st_ino && opened.st_dev == named.st_dev;
}

void BuildFolder::remove_dataset_files() const {
  remove_files(path(), is_dataset_file);
}

void BuildFolder::publish(const std::string& output) const {
  const bool replaces = path_exists(output);
  // An exchange leaves no moment without a dataset; file systems that cannot do it get two renames.
  const bool exchanged = replaces && ::renameat2(AT_FDCWD, path().c_str(), AT_FDCWD, output.c_str(),
                                                 RENAME_EXCHANGE) == 0;
  const std::string old = exchanged ? path() : output + ".old";
  if (replaces && !exchanged && ::rename(output.c_str(), old.c_str()) != 0)
    throw_errno("cannot move the old dataset away from", output, errno);
  if (!exchanged && ::rename(path().c_str(), output.c_str()) != 0)
    throw_errno("cannot rename the finished dataset to", output, errno);
  fs::remove(join_path(output, kProgressFile));
  flush_folder(parent_folder(output));
  if (!replaces) return;
  remove_files(old, is_dataset_file);
  std::error_code error;
  if (!fs::remove(old, error))
    log_warning("data build: files that are no part of a dataset were left in '{}'", old);
}

}  // namespace dstrain
