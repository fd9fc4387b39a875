// The folder that a build works in, and its exchange with the finished dataset.
#pragma once

#include <string>

#include "core/base/file.h"

namespace dstrain {

// Creates the folder if need be and locks it against a second build; the lock ends with the
// process. Temporary files of a killed build are removed. UsageError if another build holds the
// lock.
class BuildFolder {
 public:
  explicit BuildFolder(const std::string& path);

  const std::string& path() const { return folder_.path(); }
  // Removes the files of a dataset; whatever else lies in the folder stays.
  void remove_dataset_files() const;
  // Gives the folder the name `output`, taking the place of an old dataset if there is one. The old
  // one's files are removed. A crash leaves the old or the new dataset complete.
  void publish(const std::string& output) const;

 private:
  bool is_still_here() const;

  File folder_;
};

}  // namespace dstrain
