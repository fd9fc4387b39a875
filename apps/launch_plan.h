// What to start: this process alone, or ranks through mpirun, and with which words. Pure functions;
// launch_machine.h looks at the machine.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "apps/rank_environment.h"
#include "core/config/config.h"

namespace dstrain {

// Ranks to start on one host; the name is empty for this machine without launch.hosts.
struct HostRanks {
  std::string host;
  int64_t ranks = 1;
  bool operator==(const HostRanks&) const = default;
};

// The ranks that `launch` and `parallel` ask for. launch.ranks: auto is what the layout takes;
// where parallel.data is auto as well, it is one rank per GPU if that is more. ConfigError if a
// fixed layout does not divide over launch.hosts.
std::vector<HostRanks> ranks_to_start(const Config& config, int64_t gpus);
int64_t total_ranks(const std::vector<HostRanks>& hosts);
int64_t most_ranks_of_host(const std::vector<HostRanks>& hosts);  // at least 1

enum class LaunchMode {
  single,    // train in this process
  launcher,  // start the ranks and look after them
  rank,      // mpirun or srun has started this process as one of them
};
LaunchMode launch_mode(const std::optional<RankEnvironment>& ranks,
                       const std::vector<HostRanks>& hosts);

struct Mpirun {
  std::string name = "mpirun";  // as it was asked for: a name to be found in PATH, or a path
  std::string path;
  int major = 0;  // of Open MPI's version
};

struct Machine {
  std::string name;   // as it calls itself: its host name
  int64_t cores = 1;  // that this process may use
  bool is_root = false, is_container = false;
  bool allows_root = false;        // the user has set the variables that Open MPI asks for
  bool can_read_processes = true;  // whether one process may read another's memory
};

struct LaunchPlan {
  std::vector<HostRanks> hosts;
  Mpirun mpirun;
  Machine machine;
  std::string program;         // this program, as a path that is good on all hosts
  std::string session_folder;  // see rank_board.h
  std::optional<int> columns;  // of the terminal behind standard error
};

struct MpirunCommand {
  std::string path;                // of the file to execute
  std::vector<std::string> words;  // the first is the name it is called by
  std::vector<std::pair<std::string, std::string>> variables;  // added to the environment
  std::vector<std::string> notes;                              // for the log, a sentence each
};

// PermissionError if this is root outside a container and Open MPI has not been told to accept it.
MpirunCommand mpirun_command(const LaunchPlan& plan, const std::vector<std::string>& rank_words);

// The file in the session folder that ranks say in where they are.
std::string board_path(const std::string& session_folder);

// The words of a command line as they are typed into a shell.
std::string shell_text(const std::vector<std::string>& words);

}  // namespace dstrain
