// The order of a run: prepare, restore, steps with evaluations and checkpoints, finish.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "apps/assemble.h"
#include "apps/run_folder.h"
#include "apps/run_saves.h"
#include "apps/step_times.h"
#include "core/data/batch_stream.h"
#include "core/metrics/sink.h"
#include "parallel/rank_job.h"
#include "parallel/rank_progress.h"

namespace dstrain {

struct TrainerOptions {
  std::string resume;      // "" (refuse where checkpoints are), "latest", "none" or a step folder
  bool overwrite = false;  // delete the checkpoints that are there
  // Empty: the one that the config asks for.
  std::function<std::unique_ptr<Backend>()> make_backend = {};
};

// Everything that has to hold before the first step is checked by the constructor: data, memory, folder.
class Trainer {
 public:
  // The config is valid and available; `hub` outlives the trainer and has no sinks but the console yet:
  // the file sinks are added here, where the resumed step is known. A checkpoint at or behind
  // train.steps leaves nothing to do: nothing is allocated or written then, and run() returns at once.
  // `ranks`: all ranks of the job; without it this process is the only one. Only the first rank touches the
  // run folder and the hub; what it decides is told to the others.
  Trainer(const Config& config, const TrainerOptions& options, MetricsHub& hub, const JobRanks& ranks = {});
  ~Trainer();

  // Runs to train.steps, or until a signal asks to leave. Returns the exit code (0 or 75).
  ExitCode run();

 private:
  using Clock = std::chrono::steady_clock;

  // The first rank's work before the run, with what all ranks have to know of it: the checkpoint to start from.
  std::optional<VerifiedCheckpoint> agree_on_start(const TrainerOptions& options);
  void make_job(const std::optional<VerifiedCheckpoint>& checkpoint);
  void prepare_folder();
  void check_memory() const;
  void start_from(const std::optional<VerifiedCheckpoint>& checkpoint);
  void restore(const VerifiedCheckpoint& checkpoint);
  std::vector<StateSlice> residuals_in(const Manifest& manifest) const;
  void warn_of_changes(const CheckpointMeta& meta) const;
  void open_stream();
  void open_records(std::optional<int64_t> resume_step);

  // Queues a step; its record follows from complete_step() when the device is done: at once on a CPU, and
  // one step later elsewhere, so that the host never waits for the step it has just queued.
  void queue_step();
  void complete_step();
  void complete_steps();  // all that are queued
  // RuntimeFailure after too many steps without a finite gradient: train.max_skipped_steps in a row,
  // or where the run ends in a row that makes up half of it.
  void require_finite_gradients(bool is_end);
  double unweighted_balance_loss(double weighted) const;
  void evaluate();
  void save();
  void finish_saves(bool must_save);
  bool due(int64_t every) const;
  void enter(RankPhase phase) {
    if (ranks_.progress) ranks_.progress->enter(phase, step_);
  }
  CheckpointMeta checkpoint_meta() const;
  StartupInfo startup_info() const;
  RunSummary summary(const std::string& outcome) const;

  Config config_;
  RunPaths paths_;
  MetricsHub& hub_;
  std::optional<RunFolder> folder_;
  DataSet train_data_, valid_data_;
  std::map<std::string, std::string> fingerprints_;
  std::optional<HfOrigin> hf_origin_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> only_rank_;
  Communicator& world_;
  JobRanks ranks_;
  std::unique_ptr<Communicator> device_ranks_;  // of world_, where it reaches host memory alone
  std::unique_ptr<RankJob> job_;
  TrainEngine* engine_ = nullptr;  // the job's
  ChosenMethods chosen_methods_;   // by compression.method auto, on all ranks
  double flops_per_token_ = 0;

  DeviceMemory batch_memory_, eval_memory_;
  std::unique_ptr<BatchStream> stream_;
  std::optional<CheckpointStore> store_;
  std::unique_ptr<RunSaves> saves_;

  bool nothing_to_do_ = false;
  std::string left_by_;  // this process's signal
  bool wants_to_leave_ = false, wants_to_save_ = false;  // what ranks asked for
  struct QueuedStep {
    StepRecord record;
    int64_t valid_tokens = 0;
  };
  std::deque<QueuedStep> queued_;
  StepTimes step_times_;
  int64_t step_ = 0;  // queued; with queued_ empty, finished
  int64_t cursor_ = 0;
  std::vector<int64_t> skipped_samples_;
  int64_t total_tokens_ = 0, skipped_steps_ = 0;
  int64_t evaluated_step_ = -1;
  int64_t skipped_in_a_row_ = 0;
  GradTraffic last_traffic_;  // up to the step queued last
  std::string resumed_from_;
  int64_t resumed_step_ = 0;
  // Of this process.
  Clock::time_point started_;
  double step_seconds_ = 0;
  int64_t step_tokens_ = 0, steps_done_ = 0;
  ExposedRecord exposed_;
  double last_loss_ = 0;
  std::vector<EvalRecord> last_evals_;
};

}  // namespace dstrain
