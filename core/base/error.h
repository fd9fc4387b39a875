// Errors and checks. Every failure that a user can cause is one of the exception types below: a
// sentence that says what, where, why and what to do. Only apps/main.cpp catches them and turns
// them into the process exit code. DSTRAIN_CHECK guards our own promises and is always on.
#pragma once

#include <stdexcept>
#include <string>

namespace dstrain {

// Process exit codes. All are below 126, so that mpirun and Slurm pass them on unchanged.
enum class ExitCode : int {
  ok = 0,
  failure = 1,        // failed at run time
  usage = 2,          // command line misused
  bad_data = 65,      // dataset, tokenizer, weights or checkpoint malformed
  no_input = 66,      // input file missing
  storage = 74,       // storage failed (disk full, I/O error)
  preempted = 75,     // stopped by a signal after a clean save
  no_permission = 77, // permission denied
  bad_config = 78,    // job file invalid
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& what) : std::runtime_error(what), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

#define DSTRAIN_DEFINE_ERROR(Name, code_value)                                        \
  class Name : public Error {                                                         \
   public:                                                                            \
    explicit Name(const std::string& what) : Error(ExitCode::code_value, what) {}     \
  }
DSTRAIN_DEFINE_ERROR(RuntimeFailure, failure);
DSTRAIN_DEFINE_ERROR(UsageError, usage);
DSTRAIN_DEFINE_ERROR(DataError, bad_data);
DSTRAIN_DEFINE_ERROR(NotFoundError, no_input);
DSTRAIN_DEFINE_ERROR(StorageError, storage);
DSTRAIN_DEFINE_ERROR(PermissionError, no_permission);
DSTRAIN_DEFINE_ERROR(ConfigError, bad_config);
#undef DSTRAIN_DEFINE_ERROR

// Another rank failed and this one only heard of it: the report of that other one is worth reading.
class PeerFailure : public RuntimeFailure {
 public:
  using RuntimeFailure::RuntimeFailure;
};

// Throws the class that fits errno: ENOENT -> NotFoundError, EACCES/EPERM/EROFS -> PermissionError,
// anything else -> StorageError. The text is "<action> '<path>': <strerror>".
[[noreturn]] void throw_errno(const std::string& action, const std::string& path, int error_number);

[[noreturn]] void check_failed(const char* expression, const char* file, int line,
                               const std::string& message);

}  // namespace dstrain

// Always on. The message is any expression that converts to std::string.
#define DSTRAIN_CHECK(condition, message)                                          \
  do {                                                                             \
    if (!(condition)) [[unlikely]]                                                 \
      ::dstrain::check_failed(#condition, __FILE__, __LINE__, (message));          \
  } while (0)

// On in Debug builds only, for inner loops.
#ifdef NDEBUG
#define DSTRAIN_DCHECK(condition, message) ((void)0)
#else
#define DSTRAIN_DCHECK(condition, message) DSTRAIN_CHECK(condition, message)
#endif
