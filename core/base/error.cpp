#include "core/base/error.h"

#include <cerrno>
#include <cstring>

namespace dstrain {

void throw_errno(const std::string& action, const std::string& path, int error_number) {
  const std::string text = action + " '" + path + "': " + std::strerror(error_number);
  switch (error_number) {
    case ENOENT:
    case ENOTDIR:
      throw NotFoundError(text);
    case EACCES:
    case EPERM:
    case EROFS:
      throw PermissionError(text);
    default:
      throw StorageError(text);
  }
}

void check_failed(const char* expression, const char* file, int line, const std::string& message) {
  throw RuntimeFailure(std::string(file) + ":" + std::to_string(line) + ": internal check failed: " +
                       message + " [" + expression + "]; please report this with the job file");
}

}  // namespace dstrain
