#include "apps/assemble.h"

#include <chrono>
#include <cstdlib>
#include <set>

#include "apps/planned_gpu.h"
#include "core/backend/cpu_backend.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/checkpoint/hf_format.h"
#include "core/checkpoint/state_boxes.h"
#include "core/config/hf_config.h"
#include "core/data/data_file.h"
#include "core/data/tokenizer.h"
#include "core/engine/parameter_io.h"
#include "core/engine/precision.h"

#ifdef DSTRAIN_HAVE_CUDA
#include "cuda/cuda_backend.h"
#include "parallel/nccl_communicator.h"
#endif

namespace dstrain {

BuildCapabilities build_capabilities() {
  BuildCapabilities build;
  build.ranks = build.compression = build.restarts = true;
#ifdef DSTRAIN_HAVE_CUDA
  build.cuda = build.bf16_moments = true;
  build.cuda_ranks = has_nccl();
#endif
  return build;
}

#ifdef DSTRAIN_HAVE_CUDA

VisibleGpus visible_gpus_here() {
  const char* const chosen = std::getenv("CUDA_VISIBLE_DEVICES");
  return {visible_gpus(), why_no_gpu(), why_no_nccl, chosen && *chosen};
}

// Empty where the environment names no place.
static std::string cache_folder() {
  const char* const cache = std::getenv("XDG_CACHE_HOME");
  if (cache && *cache) return join_path(cache, "deepseek-train");
  const char* const home = std::getenv("HOME");
  return home && *home ? join_path(home, ".cache/deepseek-train") : "";
}

static std::unique_ptr<Backend> make_gpu_backend(const Config& config,
                                                 const RankEnvironment& rank) {
  CudaOptions options;
  options.device = static_cast<int>(device_of_rank(rank, visible_gpus()));
  options.deterministic = config.run.deterministic;
  options.tf32 = config.precision.compute == ComputeType::tf32;
  options.cache_folder = cache_folder();
  return make_cuda_backend(options);
}

static int64_t free_memory_of_gpu() {
  return visible_gpus() > 0 ? free_gpu_memory() : 0;
}

// Two ranks on one GPU would wait for each other for ever.
static void require_own_gpus(Communicator& ranks, const std::string& machine,
                             const std::string& gpu) {
  const std::vector<std::string> gpus = ranks.all_gather_text(machine + " " + gpu);
  for (size_t r = 0; r < gpus.size(); ++r)
    for (size_t other = 0; other < r; ++other)
      if (gpus[r] == gpus[other])
        throw ConfigError(fmt::format(
            "ranks {} and {} have the same GPU, {}; a rank needs one of its own: start fewer ranks "
            "on this host, or let CUDA_VISIBLE_DEVICES name a GPU for each",
            other, r, gpus[r]));
}

std::unique_ptr<Communicator> make_device_ranks(const Config& config, Communicator& ranks,
                                                const std::string& machine, Backend& backend) {
  if (backend.is_cpu() || ranks.size() == 1) return nullptr;
  require_own_gpus(ranks, machine, gpu_bus_id());
  NcclOptions options;
  if (config.launch.hang_timeout > 0)
    options.timeout = std::chrono::seconds(config.launch.hang_timeout);
  options.read_variable = std::getenv;
  options.free_memory = free_gpu_memory;
  return make_nccl_communicator(ranks, backend, options);
}

#else

std::unique_ptr<Communicator> make_device_ranks(const Config&, Communicator&, const std::string&,
                                                Backend&) {
  return nullptr;
}

VisibleGpus visible_gpus_here() {
  return {0, "this build has no CUDA back end", {}, false};
}

static std::unique_ptr<Backend> make_gpu_backend(const Config&, const RankEnvironment&) {
  check_failed("a GPU", __FILE__, __LINE__, "only a build with CUDA has GPUs");
}

static int64_t free_memory_of_gpu() {
  return 0;
}

#endif

std::optional<int64_t> gpu_memory_available(const Backend& backend) {
  const int64_t free = backend.is_cpu() ? 0 : free_memory_of_gpu();
  return free > 0 ? std::optional(free) : std::nullopt;
}

int64_t gpus_for_ranks() {
  const VisibleGpus gpus = visible_gpus_here();
  return gpus.count > 1 && !gpus.why_no_ranks().empty() ? 1 : gpus.count;
}

std::unique_ptr<Backend> make_backend(const Config& config, const RankEnvironment& rank) {
  if (choose_device(config, {rank.size, rank.local_size}, visible_gpus_here()).gpu)
    return make_gpu_backend(config, rank);
  return make_cpu_backend(static_cast<int>(config.run.threads));
}

std::unique_ptr<Backend> make_planning_backend(const Config& config, const JobSize& job,
                                               std::string& note) {
  const VisibleGpus gpus = visible_gpus_here();
  if (!is_gpu_job(config, job, gpus))
    return make_cpu_backend(static_cast<int>(config.run.threads));
  if (gpus.count > 0) return make_gpu_backend(config, {});
  note = "no GPU is here to plan with (" + gpus.why_none +
         "): what its operations take for themselves is not in the plan";
  return std::make_unique<PlannedGpu>();
}

EngineOptions engine_options(const Config& config, bool training, const Backend& backend) {
  EngineOptions options;
  options.micro_batch = config.train.micro_batch;
  options.global_batch = config.train.global_batch;
  options.seq_len = config.data.seq_len;
  options.recompute = config.train.recompute;
  options.optimizer = config.optimizer;
  options.training = training;
  set_precision(config.precision, backend, options);
  return options;
}

std::string precision_name(const Config& config, const EngineOptions& options) {
  std::string name = options.dtype != DType::f32                     ? dtype_name(options.dtype)
                     : config.precision.compute == ComputeType::tf32 ? "tf32"
                                                                     : "fp32";
  if (options.moments == DType::bf16) name += ", moments bf16";
  if (config.precision.reduce == ReduceType::bf16) name += ", sums of gradients bf16";
  return name;
}

RunPaths::RunPaths(const std::string& run_folder)
    : folder(run_folder),
      checkpoints(join_path(folder, "checkpoints")),
      metrics(join_path(folder, "metrics.jsonl")),
      tensorboard(join_path(folder, "tensorboard")),
      config(join_path(folder, "job.yaml")) {}

RunPaths::RunPaths(const Config& c) : RunPaths(join_path(c.run.dir, c.run.name)) {}

void resolve_vocab_size(Config& config) {
  if (config.model.vocab_size > 0) return;
  if (config.data.tokenizer.empty())
    throw ConfigError("model.vocab_size is 0, which takes the tokenizer's size, but data.tokenizer is not set");
  config.model.vocab_size = Tokenizer::load(config.data.tokenizer).vocab_size();
}

std::string file_fingerprint(const std::string& path) { return fmt::format("{:016x}", hash_file(path)); }

int64_t DataSet::tokens() const {
  int64_t n = 0;
  for (const TokenDataset& d : datasets) n += d.num_tokens();
  return n;
}

int64_t DataSet::documents() const {
  int64_t n = 0;
  for (const TokenDataset& d : datasets) n += d.num_documents();
  return n;
}

int64_t DataSet::text_bytes() const {
  int64_t n = 0;
  for (const TokenDataset& d : datasets) {
    if (d.text_bytes() < 0) return -1;
    n += d.text_bytes();
  }
  return n;
}

DataSet open_data(const std::vector<DataSourceConfig>& sources, const std::string& tokenizer) {
  DataSet set;
  const uint64_t wanted = tokenizer.empty() ? 0 : hash_file(tokenizer);
  set.datasets.reserve(sources.size());
  for (const DataSourceConfig& source : sources) {
    set.datasets.push_back(TokenDataset::open(source.path));
    set.sources.push_back({&set.datasets.back(), source.weight});
    const uint64_t built_with = set.datasets.back().tokenizer_fingerprint();
    if (wanted != 0 && built_with != 0 && built_with != wanted)
      throw DataError("'" + source.path + "' was built with another tokenizer than data.tokenizer '" + tokenizer +
                      "': its ids stand for other tokens; build it again with this tokenizer, or name the one it "
                      "was built with");
  }
  return set;
}

void warn_of_vocabulary(const DataSet& data, int64_t vocab_size) {
  for (const TokenDataset& dataset : data.datasets) {
    const int64_t has = dataset.vocab_size();
    // Megatron's files do not say; theirs is what an id can be.
    if (has <= vocab_size || has == int64_t{1} << 16 || has == int64_t{1} << 31) continue;
    log_warning(
        "'{}' was made with a vocabulary of {}, and model.vocab_size is {}: the first id beyond "
        "it ends the run",
        dataset.path(), has, vocab_size);
  }
}

void require_memory(int64_t bytes, const std::string& parts) {
  const int64_t available = available_memory_bytes();
  if (available > 0 && bytes > available)
    throw ConfigError(
        fmt::format("this needs {} of memory and {} are available; lower train.micro_batch or "
                    "data.seq_len, or set train.recompute to selective or full{}",
                    format_bytes(bytes), format_bytes(available), parts));
}

void require_gpu_memory(int64_t bytes, const std::optional<int64_t>& available,
                        const std::string& parts) {
  if (available && bytes > *available)
    throw ConfigError(
        fmt::format("this needs {} of GPU memory and {} are free; lower train.micro_batch or "
                    "data.seq_len, or set train.recompute to selective or full{}",
                    format_bytes(bytes), format_bytes(*available), parts));
}

std::vector<StateTensor> state_tensors(TrainEngine& engine) { return state_tensors(engine.saved_state()); }

// A parameter that only the checkpoint has would be dropped without a word; one that only the model has
// is reported by the reader.
static void check_all_used(const CheckpointReader& reader, const ModelConfig& config) {
  const DeepSeekModel model(config);
  for (const ManifestTensor& stored : reader.manifest().tensors)
    if (stored.name.starts_with("param.") && !model.parameters().find(stored.name.substr(6)))
      throw DataError(fmt::format("checkpoint '{}' holds '{}', for which this job's model has no place; its "
                                  "configuration differs",
                                  reader.path(), stored.name));
}

// Boxes of a slice follow each other, so that it is read whole. Types of a run and of its
// checkpoint may differ.
static void load_slice(TrainEngine& engine, CheckpointReader& reader, const StateSlice& slice) {
  std::vector<float> values(static_cast<size_t>(slice.end - slice.begin));
  float* at = values.data();
  for (const StateTensor& box : state_boxes(slice)) {
    reader.read_f32(box, at);
    at += box.bytes() / dtype_bytes(box.dtype);
  }
  if (slice.add) {
    const std::vector<float> held = read_slice(engine.backend(), engine.stream(), slice);
    for (size_t i = 0; i < held.size(); ++i) values[i] += held[i];
  }
  write_slice(engine.backend(), engine.stream(), values, slice);
}

void load_state(TrainEngine& engine, CheckpointReader& reader, bool with_optimizer,
                const std::vector<StateSlice>& residuals) {
  check_all_used(reader, engine.model().config());
  for (const StateSlice& slice : engine.loaded_state())
    if (with_optimizer || slice.kind == "param") load_slice(engine, reader, slice);
  if (!with_optimizer) return;
  for (const StateSlice& slice : residuals) load_slice(engine, reader, slice);
}

// The slice's elements of a whole tensor: rows of the last dim are neighbours in both.
static void copy_slice(const std::vector<float>& whole, const StateSlice& slice,
                       std::vector<float>& part) {
  const Parameter& parameter = *slice.parameter;
  const int64_t row = parameter.local_shape.empty() ? 1 : parameter.local_shape.back();
  part.clear();
  for (int64_t i = slice.begin; i < slice.end;) {
    const int64_t run = std::min(slice.end - i, row - i % row);
    const auto begin = whole.begin() + parameter.global_index(i);
    part.insert(part.end(), begin, begin + run);
    i += run;
  }
}

HfOrigin load_hf_parameters(TrainEngine& engine, const std::string& folder) {
  HfOrigin origin;
  origin.folder = folder;
  origin.config = read_small_file(join_path(folder, "config.json"), kMaxHfConfigBytes);
  const DeepSeekModel whole(engine.model().config());
  const std::vector<StateSlice> slices = engine.loaded_state();
  std::vector<float> part;
  origin.types = read_hf_weights(
      folder, whole.config(), whole.parameters(), [&](const std::string& name, const std::vector<float>& values) {
        for (const StateSlice& slice : slices) {
          if (slice.kind != "param" || slice.parameter->spec.name != name) continue;
          copy_slice(values, slice, part);
          write_slice(engine.backend(), engine.stream(), part, slice);
        }
      });
  return origin;
}

VerifiedCheckpoint find_checkpoint(const std::string& path) {
  if (path_exists(join_path(path, kManifestFileName))) {
    const CheckpointReport report = check_checkpoint(path, CheckDepth::contents);
    if (!report.ok()) throw DataError(path + ": " + report.summary());
    return {path, *report.manifest};
  }
  const RunPaths paths(path);
  CheckpointStore store(path_exists(paths.checkpoints) ? paths.checkpoints : path, 1);
  std::optional<VerifiedCheckpoint> found =
      store.latest([](const std::string& line) { log_warning("checkpoint rejected: {}", line); });
  if (!found)
    throw NotFoundError("'" + path + "' holds no checkpoint; give a run folder or one of its step folders");
  return *std::move(found);
}

}  // namespace dstrain
