// The program under test as a child process: arguments, environment, limits, signals, and what it
// wrote. A child never outlives the test program.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "test/support/temp_folder.h"

namespace dstrain::test {

struct Launch {
  std::vector<std::string> args;
  std::string folder;            // working folder; empty = the test's
  std::string failpoint;         // DSTRAIN_FAILPOINT; see core/checkpoint/failpoint.h
  std::string input;             // standard input, then its end
  std::optional<int> stdout_fd;  // a descriptor that becomes standard output
  std::optional<int> stderr_fd;
  std::vector<int> ignored_signals;        // as nohup does
  std::optional<int64_t> file_size_limit;  // RLIMIT_FSIZE, bytes
  std::string program = DSTRAIN_BINARY;
};

struct Finished {
  int code = -1;   // exit code; -1 if a signal ended it
  int signal = 0;  // that signal
  std::string out, err;
  double seconds = 0;

  std::string text() const { return out + err; }
};

// One running program. Everything here fails the test case after `deadline` seconds.
class RunningProgram {
 public:
  explicit RunningProgram(const Launch& launch);
  ~RunningProgram();  // kills it if it still runs
  RunningProgram(const RunningProgram&) = delete;
  RunningProgram& operator=(const RunningProgram&) = delete;

  pid_t pid() const { return pid_; }
  std::string err() const;  // written so far
  void send(int signal) const;
  bool is_running();
  Finished wait(double deadline = kDeadline);

  // Waits until the condition holds; false if the program ends first.
  bool wait_until(const std::function<bool()>& condition, double deadline = kDeadline);

  static constexpr double kDeadline = 60;

 private:
  bool reap(bool block);

  TempFolder files_;
  pid_t pid_ = -1;
  double started_ = 0, ended_ = 0;
  std::optional<int> status_;
};

Finished run_program(const Launch& launch);
Finished run_program(const std::vector<std::string>& args, const std::string& folder = "");

double monotonic_seconds();
void sleep_ms(double milliseconds);

std::string read_file(const std::string& path);  // "" where there is none
void write_file(const std::string& path, const std::string& bytes);

// A tmpfs of its own, for full and read-only disks. Call mounted() first: it needs root.
class SmallDisk {
 public:
  // options as for mount -o, such as "size=2m".
  explicit SmallDisk(const std::string& options);
  ~SmallDisk();
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;

  bool mounted() const { return error_.empty(); }
  const std::string& error() const { return error_; }
  const std::string& path() const { return folder_.path(); }
  void remount_read_only();

 private:
  TempFolder folder_;
  std::string error_;
};

// The line that scripts/test.sh counts.
void print_skipped(const std::string& reason);

}  // namespace dstrain::test
