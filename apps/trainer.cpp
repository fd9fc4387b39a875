#include "apps/trainer.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "apps/evaluation.h"
#include "apps/job_agreement.h"
#include "apps/next_commands.h"
#include "apps/signals.h"
#include "apps/startup_info.h"
#include "build_info.h"
#include "core/backend/cpu_backend.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/checkpoint/state_boxes.h"
#include "core/config/config_io.h"
#include "core/metrics/expert_load.h"
#include "core/metrics/jsonl_sink.h"
#include "core/metrics/report.h"
#include "core/metrics/tensorboard_sink.h"
#include "core/model/cost.h"
#include "core/optim/lr_schedule.h"
#include "parallel/residual_state.h"

namespace dstrain {
namespace {

double seconds_between(std::chrono::steady_clock::time_point a, std::chrono::steady_clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

// Without times, which come with the step's results.
GradientTraffic traffic_between(const GradTraffic& before, const GradTraffic& after) {
  const auto apart = [](const PhaseTraffic& a, const PhaseTraffic& b) {
    return TrafficRecord{b.sent - a.sent, b.baseline - a.baseline,
                         b.sent_between_nodes - a.sent_between_nodes,
                         b.baseline_between_nodes - a.baseline_between_nodes};
  };
  return {apart(before.reduce, after.reduce), apart(before.gather, after.gather)};
}

// The kinds of state that a checkpoint holds, by parameter.
SavedKinds saved_kinds(const Manifest& manifest) {
  return [kinds = kinds_by_parameter(manifest)](const Parameter& parameter) {
    const auto at = kinds.find(parameter.spec.name);
    return at == kinds.end() ? std::vector<std::string>() : at->second;
  };
}

// What compression.method auto had chosen, and for what residuals are there.
constexpr const char* kCompressionKey = "compression";
EarlierCompression earlier_compression(const Manifest& manifest) {
  EarlierCompression earlier;
  const auto at = manifest.meta.program.find(kCompressionKey);
  if (at != manifest.meta.program.end()) earlier.methods = ChosenMethods::parse(at->second);
  earlier.kinds = saved_kinds(manifest);
  return earlier;
}

using Fingerprints = std::map<std::string, std::string>;

void add_fingerprints(const std::string& list, const DataSet& data, Fingerprints& out) {
  for (size_t i = 0; i < data.datasets.size(); ++i)
    out[fmt::format("{}[{}]", list, i)] = fmt::format("{:016x}", data.datasets[i].content_hash());
}

// Of what the order of the samples depends on.
Fingerprints data_fingerprints(const Config& config, const DataSet& train) {
  Fingerprints out;
  if (!config.data.tokenizer.empty()) out["tokenizer"] = file_fingerprint(config.data.tokenizer);
  add_fingerprints("data.train", train, out);
  return out;
}

}  // namespace

Trainer::Trainer(const Config& config, const TrainerOptions& options, MetricsHub& hub,
                 const JobRanks& ranks)
    : config_(config),
      paths_(config),
      hub_(hub),
      backend_(options.make_backend ? options.make_backend() : make_backend(config, ranks.place)),
      only_rank_(ranks.world ? nullptr : std::make_unique<LocalCommunicator>(*backend_)),
      world_(ranks.world ? *ranks.world : *only_rank_),
      ranks_(ranks),
      device_ranks_(make_device_ranks(config_, world_, ranks.machine, *backend_)),
      step_times_(*backend_) {
  train_data_ = open_data(config_.data.train, config_.data.tokenizer);
  valid_data_ = open_data(config_.data.valid, config_.data.tokenizer);
  fingerprints_ = data_fingerprints(config_, train_data_);
  Fingerprints of_all_data = fingerprints_;
  add_fingerprints("data.valid", valid_data_, of_all_data);
  require_same_data(world_, ranks_.machine, of_all_data);
  if (world_.rank() == 0)
    for (const DataSet* data : {&train_data_, &valid_data_})
      warn_of_vocabulary(*data, config_.model.vocab_size);
  const std::optional<VerifiedCheckpoint> checkpoint = agree_on_start(options);
  if (checkpoint && checkpoint->manifest.meta.step >= config_.train.steps) {
    nothing_to_do_ = true;
    log_info("nothing to do: {} is at step {} and train.steps is {}; raise train.steps to train on",
             checkpoint->path, checkpoint->manifest.meta.step, config_.train.steps);
    return;
  }
  if (checkpoint) {
    resumed_from_ = checkpoint->path;
    resumed_step_ = checkpoint->manifest.meta.step;
  }
  make_job(checkpoint);
  check_memory();
  hub_.on_start(startup_info());
  start_from(checkpoint);
  open_stream();
  world_.barrier();  // nobody reads a checkpoint any more
  if (world_.rank() != 0) return;
  // Not before everything else was found good.
  if (options.overwrite) store_->remove_all(folder_->lock());
  open_records(checkpoint ? std::optional(resumed_step_) : std::nullopt);
  write_file_atomic(paths_.config, dump_config(config_));
  folder_->keep();
}

Trainer::~Trainer() = default;

void Trainer::make_job(const std::optional<VerifiedCheckpoint>& checkpoint) {
  job_ = std::make_unique<RankJob>(
      config_, resolve_mesh(config_, world_.size()), device_ranks_ ? *device_ranks_ : world_,
      *backend_, ranks_.machine, /*training=*/true, DistributionWrap(),
      checkpoint ? earlier_compression(checkpoint->manifest) : EarlierCompression());
  engine_ = &job_->engine();
  flops_per_token_ = model_cost(config_.model, config_.data.seq_len).flops_per_token;
  // Stages of a pipeline have other ranges.
  if (const AutoCompression* chooser = job_->distribution().auto_compression())
    for (const std::string& text : world_.all_gather_text(chooser->chosen().text()))
      chosen_methods_.add(ChosenMethods::parse(text));
}

std::optional<VerifiedCheckpoint> Trainer::agree_on_start(const TrainerOptions& options) {
  std::optional<VerifiedCheckpoint> checkpoint;
  if (world_.rank() == 0) {
    prepare_folder();
    checkpoint = choose_checkpoint(paths_, *store_, options.resume, options.overwrite);
  } else {
    store_.emplace(paths_.checkpoints, config_.checkpoint.keep);
  }
  const std::string path = world_.all_gather_text(checkpoint ? checkpoint->path : "")[0];
  if (world_.rank() != 0 && !path.empty()) {
    CheckpointReader reader(path);  // the first rank has verified it
    checkpoint = VerifiedCheckpoint{path, reader.manifest()};
  }
  return checkpoint;
}

void Trainer::prepare_folder() {
  folder_.emplace(paths_.folder, ranks_.place.is_supervised ? RunRole::ranks : RunRole::alone);
  store_.emplace(paths_.checkpoints, config_.checkpoint.keep);
  if (path_exists(paths_.checkpoints))
    for (const std::string& path : store_->remove_leftovers(folder_->lock()))
      log_info("removed {}, which a save that did not end left behind", path);
}

void Trainer::check_memory() const {
  const StartupInfo info = startup_info();
  require_memory(info.host_memory_bytes() * ranks_.place.local_size,
                 largest_memory_part(info, /*on_gpu=*/false));
  require_gpu_memory(info.gpu_memory_bytes(), info.gpu_available_bytes,
                     largest_memory_part(info, /*on_gpu=*/true));
}

void Trainer::start_from(const std::optional<VerifiedCheckpoint>& checkpoint) {
  engine_->allocate();
  saves_ = std::make_unique<RunSaves>(config_, world_, *backend_, *engine_, *store_, hub_);
  if (checkpoint) return restore(*checkpoint);
  engine_->initialize(static_cast<uint64_t>(config_.run.seed));
  if (!config_.model.from.empty()) hf_origin_ = load_hf_parameters(*engine_, config_.model.from);
}

void Trainer::restore(const VerifiedCheckpoint& checkpoint) {
  const CheckpointMeta& meta = checkpoint.manifest.meta;
  warn_of_changes(meta);
  engine_->initialize(static_cast<uint64_t>(config_.run.seed));
  CheckpointReader reader(checkpoint.path, checkpoint.manifest);
  // An imported model brings weights alone; its moments start at zero, as those of a new run do.
  const bool with_moments = meta.step > 0;
  if (!with_moments) log_info("{} holds weights without optimizer state: moments start at zero", checkpoint.path);
  load_state(*engine_, reader, with_moments, residuals_in(checkpoint.manifest));
  hf_origin_ = get_hf_origin(meta, checkpoint.path);
  auto counter = [&](const char* name) {
    const auto at = meta.counters.find(name);
    return at == meta.counters.end() ? int64_t{0} : at->second;
  };
  engine_->set_progress(meta.step, counter("updates"));
  total_tokens_ = counter("tokens");
  skipped_steps_ = counter("skipped_steps");
  step_ = meta.step;
  cursor_ = meta.samples_consumed;
  skipped_samples_ = meta.skipped_samples;
}

// What the checkpoint holds of gradients that compression has not sent yet.
std::vector<StateSlice> Trainer::residuals_in(const Manifest& manifest) const {
  const auto kinds = kinds_by_parameter(manifest);
  std::vector<StateSlice> residuals = job_->distribution().loaded_residuals(saved_kinds(manifest));
  const bool are_there = std::ranges::any_of(
      kinds, [](const auto& of) { return std::ranges::any_of(of.second, is_residual); });
  if (world_.rank() == 0 && are_there && residuals.empty())
    log_warning("the checkpoint holds parts of gradients that compression had not sent yet; this job keeps no "
                "such parts, and they are left out");
  return residuals;
}

void Trainer::warn_of_changes(const CheckpointMeta& meta) const {
  if (world_.rank() != 0) return;
  const Config before = parse_config_text(meta.config_yaml, "the checkpoint's configuration");
  for (const std::string& line : diff_config(before, config_))
    log_warning("changed since the checkpoint: {}", line);
  for (const auto& [name, print] : fingerprints_) {
    const auto at = meta.fingerprints.find(name);
    if (at != meta.fingerprints.end() && at->second != print)
      log_warning("{} holds other contents than when the checkpoint was written: sample order goes on "
                  "by position, over different tokens",
                  name);
  }
  const std::string isa = check_instruction_set();
  const auto at = meta.program.find("isa");
  if (at != meta.program.end() && at->second != isa)
    log_warning("the checkpoint was written with {} code, this program is {}: losses agree to rounding, not "
                "to the bit",
                at->second, isa);
}

void Trainer::open_stream() {
  const int64_t slot = BatchStream::slot_bytes(config_.train.micro_batch, config_.data.seq_len);
  batch_memory_ = DeviceMemory(*backend_, slot * config_.data.prefetch, MemoryKind::host);
  BatchStreamOptions options;
  options.pack = {config_.data.seq_len, config_.data.document_mask, config_.data.shuffle,
                  static_cast<uint64_t>(config_.run.seed)};
  options.vocab_size = config_.model.vocab_size;
  options.micro_batch = config_.train.micro_batch;
  options.global_batch = config_.train.global_batch;
  options.dp_rank = job_->mesh().place().data.rank;
  options.dp_size = job_->mesh().place().data.size;
  options.start = cursor_;
  options.skip = skipped_samples_;
  if (!valid_data_.datasets.empty())
    eval_memory_ = DeviceMemory(*backend_, evaluation_bytes(config_), MemoryKind::host);
  stream_ = std::make_unique<BatchStream>(train_data_.sources, options, batch_memory_.data(),
                                          batch_memory_.bytes());
}

// Only once nothing else can fail: rewinding the files of an earlier attempt loses their last lines.
void Trainer::open_records(std::optional<int64_t> resume_step) {
  const StartupInfo info = startup_info();
  const auto add = [&](std::unique_ptr<MetricsSink> sink) {
    sink->on_start(info);
    hub_.add(std::move(sink));
  };
  if (config_.metrics.jsonl) add(std::make_unique<JsonlSink>(paths_.metrics, resume_step));
  if (config_.metrics.tensorboard)
    add(std::make_unique<TensorBoardSink>(paths_.tensorboard, resume_step));
}

bool Trainer::due(int64_t every) const { return every > 0 && step_ % every == 0; }

ExitCode Trainer::run() {
  if (nothing_to_do_) return ExitCode::ok;
  started_ = Clock::now();
  std::string left_by;
  while (step_ < config_.train.steps) {
    saves_->check_memory();
    queue_step();
    require_finite_gradients(/*is_end=*/false);
    saves_->report();
    if (due(config_.train.eval_every)) evaluate();
    if (wants_to_leave_) {
      left_by = left_by_.empty() ? "another rank's signal" : left_by_;
      break;
    }
    // A state that no gradient is finite at must not push good checkpoints out.
    if (wants_to_save_ || (due(config_.checkpoint.every) && skipped_in_a_row_ == 0))
      save();
  }
  complete_steps();
  if (left_by.empty()) require_finite_gradients(/*is_end=*/true);
  if (!left_by.empty())
    log_info("{}: saving step {}, then leaving{}", left_by, step_,
             left_by == "SIGINT" ? "; a second Ctrl-C leaves at once" : "");
  const bool must_save = !left_by.empty() || config_.checkpoint.at_end;
  if (must_save && !saves_->has(step_)) save();
  if (left_by.empty()) evaluate();
  finish_saves(must_save);
  const bool stopped = !left_by.empty() && step_ < config_.train.steps;
  hub_.on_end(summary(stopped ? "stopped by " + left_by : "finished"));
  return stopped ? ExitCode::preempted : ExitCode::ok;
}

void Trainer::queue_step() {
  QueuedStep step;
  StepRecord& record = step.record;
  record.step = ++step_;
  record.steps = config_.train.steps;
  record.lr = learning_rate(config_.schedule, config_.optimizer.lr, step_, config_.train.steps);
  enter(RankPhase::data);
  step_times_.begin(engine_->stream());
  job_->exposed().begin_step();
  job_->runner().run([&](int64_t m) {
    const Clock::time_point wait = Clock::now();
    const HostMicroBatch& batch = stream_->next();
    record.phases.data_ms += 1e3 * seconds_between(wait, Clock::now());
    if (m == 0) engine_->begin_step(record.lr, step.valid_tokens = batch.step_valid_tokens);
    engine_->load(m, to_host_batch(batch), batch.last_of_step);
    stream_->release();
    enter(RankPhase::forward_backward);  // each micro-batch is progress
  });
  enter(RankPhase::reducing);
  step_times_.begin_update(engine_->stream());
  if (left_by_.empty()) left_by_ = leave_requested();
  // A signal to the job reaches its ranks at different steps: one rank's counts, or it would save twice.
  const bool save = take_save_request() && world_.rank() == 0;
  engine_->request(!left_by_.empty(), save);
  engine_->finish_step();
  step_times_.end(engine_->stream());
  job_->exposed().end_step();
  if (world_.size() > 1) {
    const GradTraffic sent = job_->distribution().traffic();
    record.traffic = traffic_between(last_traffic_, sent);
    last_traffic_ = sent;
  }
  cursor_ = stream_->cursor();
  queued_.push_back(std::move(step));
  const size_t behind = backend_->is_cpu() ? 0 : 1;
  while (queued_.size() > behind) complete_step();
}

void Trainer::complete_steps() {
  while (!queued_.empty()) complete_step();
}

void Trainer::complete_step() {
  const StepResult result = engine_->take_result();
  const StepTime time = step_times_.take();
  QueuedStep step = std::move(queued_.front());
  queued_.pop_front();
  StepRecord& record = step.record;
  wants_to_leave_ = wants_to_leave_ || result.ranks_leaving > 0;
  wants_to_save_ = wants_to_save_ || result.ranks_saving > 0;
  if (world_.size() > 1) exposed_ += *(record.exposed = job_->exposed().take());
  if (record.traffic) {
    const ReduceSeconds seconds_of_sums = job_->distribution().reduce_times().take();
    record.traffic->reduce_scatter.ms = 1e3 * seconds_of_sums.reduce;
    record.traffic->all_gather.ms = 1e3 * seconds_of_sums.gather;
  }
  record.loss = last_loss_ = result.loss;
  if (config_.model.num_nextn_predict_layers > 0) record.mtp_loss = result.mtp_loss;
  record.grad_norm = result.grad_norm;
  record.tokens = config_.train.global_batch * config_.data.seq_len;
  record.total_tokens = total_tokens_ += record.tokens;
  record.step_ms = 1e3 * time.seconds;
  record.tokens_per_s = static_cast<double>(record.tokens) / time.seconds;
  record.gflops_per_s = 1e-9 * flops_per_token_ * record.tokens_per_s;
  record.skipped = !result.finite;
  record.skipped_total = skipped_steps_ += result.finite ? 0 : 1;
  record.phases.optimizer_ms = 1e3 * time.update_seconds;
  record.phases.forward_backward_ms = record.step_ms - record.phases.optimizer_ms;
  // A device computes on while the host waits.
  if (backend_->is_cpu()) record.phases.forward_backward_ms -= record.phases.data_ms;
  record.phases.checkpoint_stall_ms = 1e3 * saves_->take_stall_seconds();
  if (engine_->model().num_moe_layers() > 0)
    record.experts = expert_load(result.expert_counts_LE, engine_->model().num_moe_layers(),
                                 unweighted_balance_loss(result.balance_loss));
  const bool tells = world_.rank() == 0;  // what all ranks find
  if (record.skipped && tells)
    log_warning("step {}: the gradient is not finite (loss {}); nothing was updated, {} skipped so far",
                record.step, format_fixed(result.loss, 4), format_plural(skipped_steps_, "step"));
  skipped_in_a_row_ = record.skipped ? skipped_in_a_row_ + 1 : 0;
  if (step.valid_tokens == 0 && tells)
    log_warning("step {}: no token of the batch has a target", record.step);
  step_seconds_ += time.seconds;
  step_tokens_ += record.tokens;
  ++steps_done_;
  hub_.on_step(record);
}

// A few steps that are skipped may be those of bad data; a run of nothing else has diverged, even if
// it is too short for the limit.
void Trainer::require_finite_gradients(bool is_end) {
  const bool is_half = is_end && skipped_in_a_row_ > 0 && 2 * skipped_in_a_row_ >= step_;
  if (skipped_in_a_row_ < config_.train.max_skipped_steps && !is_half) return;
  saves_->wait_and_report();
  throw RuntimeFailure(fmt::format(
      "{} in a row had a gradient that is not finite, the last one step {}; nothing is saved over the "
      "checkpoints before. Lower optimizer.lr or turn on optimizer.grad_clip, and go on with --resume latest",
      format_plural(skipped_in_a_row_, "step"), step_ - std::ssize(queued_)));
}

double Trainer::unweighted_balance_loss(double weighted) const {
  const double weight =
      config_.model.aux_loss_alpha * static_cast<double>(engine_->model().num_moe_layers());
  return weight > 0 ? weighted / weight : 0.0;
}

void Trainer::evaluate() {
  if (valid_data_.datasets.empty() || evaluated_step_ == step_) return;
  complete_steps();
  enter(RankPhase::evaluating);
  evaluated_step_ = step_;
  last_evals_.clear();
  for (size_t i = 0; i < valid_data_.datasets.size(); ++i) {
    EvalRecord record = evaluate_dataset(*job_, config_, valid_data_.datasets[i], eval_memory_,
                                         [this] { enter(RankPhase::evaluating); });
    record.step = step_;
    hub_.on_eval(record);
    last_evals_.push_back(record);
  }
}

CheckpointMeta Trainer::checkpoint_meta() const {
  CheckpointMeta meta;
  meta.step = step_;
  meta.seed = config_.run.seed;
  meta.samples_consumed = cursor_;
  meta.skipped_samples = skipped_samples_;
  meta.counters = {{"tokens", total_tokens_},
                   {"updates", engine_->updates()},
                   {"skipped_steps", skipped_steps_}};
  meta.values = {{"loss", last_loss_}};
  meta.fingerprints = fingerprints_;
  meta.program = {{"version", DSTRAIN_VERSION},
                  {"commit", DSTRAIN_COMMIT},
                  {"isa", check_instruction_set()},
                  {"backend", backend_->describe()},
                  {"matmul", matmul_library()}};
  if (const std::string chosen = chosen_methods_.text(); !chosen.empty())
    meta.program[kCompressionKey] = chosen;
  if (hf_origin_) put_hf_origin(*hf_origin_, meta);
  meta.layout = world_.size() == 1 ? "one rank" : to_text(job_->mesh().shape());
  meta.config_yaml = dump_config(config_);
  return meta;
}

void Trainer::save() {
  complete_steps();
  wants_to_save_ = false;
  enter(RankPhase::saving);
  saves_->request(checkpoint_meta());
}

// Where the last state must reach the disk, a failed save is tried again until the limit.
void Trainer::finish_saves(bool must_save) {
  enter(RankPhase::leaving);
  saves_->wait_and_report();
  while (must_save && !saves_->has(step_)) {
    save();
    saves_->wait_and_report();
  }
}

StartupInfo Trainer::startup_info() const {
  StartupInfo info = startup_info_of(config_, job_.get());
  info.resume = resumed_from_;
  info.resume_step = resumed_step_;
  for (size_t i = 0; i < train_data_.datasets.size(); ++i)
    info.data.push_back(data_row("train", config_.data.train[i], &train_data_.datasets[i]));
  for (size_t i = 0; i < valid_data_.datasets.size(); ++i)
    info.data.push_back(data_row("valid", config_.data.valid[i], &valid_data_.datasets[i]));
  info.epochs = epochs_of(info);
  return info;
}

RunSummary Trainer::summary(const std::string& outcome) const {
  RunSummary s;
  s.outcome = outcome;
  s.step = step_;
  s.steps = config_.train.steps;
  s.total_tokens = total_tokens_;
  s.seconds = seconds_between(started_, Clock::now());
  s.loss = last_loss_;
  s.evals = last_evals_;
  s.tokens_per_s = step_seconds_ > 0 ? static_cast<double>(step_tokens_) / step_seconds_ : 0;
  s.skipped_total = skipped_steps_;
  if (world_.size() > 1) s.traffic = describe(job_->distribution().traffic());
  if (steps_done_ > 0) {
    s.step_ms = 1e3 * step_seconds_ / static_cast<double>(steps_done_);
    if (world_.size() > 1) s.exposed = exposed_.mean_of(steps_done_);
  }
  s.checkpoint = saves_->newest().empty() ? resumed_from_ : saves_->newest();
  if (config_.metrics.jsonl) s.metrics = paths_.metrics;
  if (config_.metrics.tensorboard) s.tensorboard = paths_.tensorboard;
  if (!s.checkpoint.empty()) s.next = next_commands(config_, outcome == "finished");
  return s;
}

}  // namespace dstrain
