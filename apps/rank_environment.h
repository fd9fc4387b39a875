// Which rank this process is, from the variables that mpirun and srun set, and what follows from
// that before MPI is started. Pure functions: whoever calls them passes getenv or a table.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace dstrain {

// The value of an environment variable, or null.
using Variables = std::function<const char*(const char* name)>;

struct RankEnvironment {
  int64_t rank = 0, size = 1;
  int64_t local_rank = 0, local_size = 1;  // among the ranks of this host
  bool is_bound = false;                   // the starter gave this rank cores of its own
  bool is_supervised = false;  // started by this program's own launcher, which has checked the job

  // Rank 0 alone writes into the run folder and prints what is not a warning.
  bool is_first() const { return rank == 0; }
  bool operator==(const RankEnvironment&) const = default;
};

// None where neither mpirun nor srun started this process, or it is srun's only task, or runs in a
// shell that is: such a process may start ranks of its own. UsageError if several processes were started in a way that lets no rank
// find the others: srun without PMIx, the mpiexec of another MPI.
std::optional<RankEnvironment> rank_environment(const Variables& variables);

// UsageError if mpirun or srun started several processes of this command, which is the work of one:
// each would do all of it and write to the same place. `command`: "data build".
void require_one_process(const std::string& command, const Variables& variables);

// run.threads if that is set. Otherwise an equal share of the cores that this process may use, or
// all of them where the rank is bound to its own; at least one.
int64_t threads_per_rank(int64_t configured, const RankEnvironment& ranks, int64_t cores);

// The device that this rank computes on: its local rank. Where the starter shows each rank one GPU,
// that one. ConfigError if there are fewer GPUs than local ranks.
int64_t device_of_rank(const RankEnvironment& ranks, int64_t visible_gpus);

// Of this host, as it calls itself.
std::string machine_name();

class Communicator;
class RankProgress;

// What one rank of several works with: all of it outlives the work. A process that is the only rank
// has the default.
struct JobRanks {
  Communicator* world = nullptr;
  RankEnvironment place;
  std::string machine;               // machine_name() of this rank
  RankProgress* progress = nullptr;  // told where the rank is; may be null
};

}  // namespace dstrain
