// What is known of a run before its first step and after its last. Plain values; an empty optional
// prints as "not available", as some do with --dry-run.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/metrics/step_record.h"

namespace dstrain {

struct MemoryRow {
  std::string owner;  // "parameters", "gradients", "activations", ...
  std::optional<int64_t> bytes;
  bool on_gpu = false;
};

// What NCCL takes of a GPU for the communicators of one rank, beside what the run plans.
struct CommunicatorMemory {
  int64_t count = 0;
  int64_t bytes = 0;
  bool is_measured = false;  // and taken already; estimated otherwise
};

struct DataRow {
  std::string split;   // "train" or "valid"
  std::string source;  // path
  std::optional<int64_t> tokens;
  std::optional<int64_t> documents;
  double weight = 1.0;  // share in the blend
};

struct StartupInfo {
  std::string version;
  std::string commit;
  std::string run_name;
  std::string run_dir;
  std::string resume;  // the checkpoint that the run goes on from; empty = from scratch
  int64_t resume_step = 0;
  bool dry_run = false;

  std::string device;   // "cpu", "NVIDIA H100 80GB HBM3", ...
  int64_t threads = 0;  // per rank
  std::string isa;      // "avx512"; empty on a GPU
  std::string precision;
  int64_t ranks = 1;
  std::string layout;  // "data 2 x expert 2, ZeRO-1"; empty with one rank
  // Of a job of several ranks.
  std::vector<std::string> mesh;  // lines of a drawing: who talks to whom
  std::optional<int64_t> parameters_of_rank;
  std::string parameter_memory;  // of one rank: "values 1.20 GiB, gradients ... = 4.1 GiB"
  std::string in_flight;         // micro-batches whose activations a rank keeps
  std::string expert_buffer;     // empty without expert parallelism
  std::string compression;       // what compression.method auto has chosen; empty without it
  std::string memory_rank;  // whose memory the rows below are, where it is not the same for all

  std::string model;  // one line; see describe_model
  std::optional<int64_t> parameters_total;
  std::optional<int64_t> parameters_active;  // those that one token uses
  std::optional<double> flops_per_token;     // forward and backward

  std::vector<MemoryRow> memory;  // of one rank
  std::optional<CommunicatorMemory> communicators;
  std::optional<int64_t> memory_available_bytes;  // of the host
  std::optional<int64_t> gpu_available_bytes;
  // Of the rows that are known.
  int64_t host_memory_bytes() const { return memory_bytes(false); }
  int64_t gpu_memory_bytes() const { return memory_bytes(true); }
  int64_t memory_bytes(bool on_gpu) const;

  std::vector<DataRow> data;

  int64_t steps = 0;
  int64_t tokens_per_step = 0;
  std::optional<double> epochs;
  std::string optimizer;    // one line
  std::string schedule;     // one line; see describe_schedule
  std::string checkpoints;  // one line
};

inline int64_t StartupInfo::memory_bytes(bool on_gpu) const {
  int64_t total = 0;
  for (const MemoryRow& row : memory)
    if (row.on_gpu == on_gpu) total += row.bytes.value_or(0);
  return total;
}

struct NextCommand {
  std::string why;      // "write text", "go on", "export"
  std::string command;  // as one would type it
};

struct RunSummary {
  std::string outcome = "finished";  // or "stopped by SIGTERM", "stopped: loss not finite", ...
  int64_t step = 0;
  int64_t steps = 0;
  int64_t total_tokens = 0;
  double seconds = 0;             // of this process
  double loss = 0;                // of the last step
  std::vector<EvalRecord> evals;  // the last of each set
  double tokens_per_s = 0;        // mean over this process's steps
  std::optional<double> mfu;
  int64_t skipped_total = 0;
  std::string traffic;  // of gradients, first rank, this process; empty with one rank
  // The first rank's mean over this process's steps; absent with one rank.
  std::optional<ExposedRecord> exposed;
  double step_ms = 0;       // mean over this process's steps
  std::string checkpoint;   // path of the newest; empty = none
  std::string metrics;      // path of metrics.jsonl; empty = not written
  std::string tensorboard;  // folder; empty = not written
  std::vector<NextCommand> next;
};

}  // namespace dstrain
