// From a Config to the objects of a run.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "apps/device_choice.h"
#include "apps/hf_origin.h"
#include "apps/rank_environment.h"
#include "core/checkpoint/reshard.h"
#include "core/config/availability.h"
#include "core/config/config.h"
#include "core/data/sample_order.h"
#include "core/data/token_dataset.h"
#include "core/engine/train_engine.h"

namespace dstrain {

BuildCapabilities build_capabilities();

// None, and why, in a build without CUDA. Never throws.
VisibleGpus visible_gpus_here();
// GPUs of this host that launch.ranks: auto spreads ranks over: all, or one where NCCL is missing.
int64_t gpus_for_ranks();

// On the device that choose_device() takes; on a GPU, the one of this rank. ConfigError if
// run.device cannot be had, RuntimeFailure if the GPU cannot be opened.
std::unique_ptr<Backend> make_backend(const Config& config, const RankEnvironment& rank = {});
// What the ranks of a job exchange device memory through, made from the communicator over their
// host memory; none where that one does, which is on CPUs, and for one rank. A collective call;
// `ranks` and the back end outlive it. ConfigError if two ranks have the same GPU.
std::unique_ptr<Communicator> make_device_ranks(const Config& config, Communicator& ranks,
                                                const std::string& machine, Backend& backend);
// For plans alone. Where the job is for a GPU and none is here, one that is only planned with;
// `note` is then told what the plan lacks.
std::unique_ptr<Backend> make_planning_backend(const Config& config, const JobSize& job,
                                               std::string& note);
EngineOptions engine_options(const Config& config, bool training, const Backend& backend);
// "fp32", "tf32", "bf16, moments bf16, sums of gradients bf16"
std::string precision_name(const Config& config, const EngineOptions& options);

// Where the files of a run lie.
struct RunPaths {
  explicit RunPaths(const std::string& folder);
  explicit RunPaths(const Config& config);
  std::string folder, checkpoints, metrics, tensorboard, config;
};

// model.vocab_size 0 becomes the tokenizer's. ConfigError if there is no tokenizer to ask.
void resolve_vocab_size(Config& config);
// XXH3 of a file's bytes as hex.
std::string file_fingerprint(const std::string& path);

// Opened token datasets of one list of the job file.
struct DataSet {
  std::vector<TokenDataset> datasets;
  std::vector<BatchSource> sources;  // pointing at the above; reserve-once, so addresses stay
  int64_t tokens() const;
  int64_t documents() const;
  int64_t text_bytes() const;  // -1 if a source did not record it
};
// DataError if one was built with another tokenizer than this file (empty: not checked).
DataSet open_data(const std::vector<DataSourceConfig>& sources, const std::string& tokenizer);

// Says which datasets may hold ids beyond the model's vocabulary: the first such id ends a run.
void warn_of_vocabulary(const DataSet& data, int64_t vocab_size);

// ConfigError, with what to change, if the system has less memory available than this. `parts` goes
// on where the sentence ends.
void require_memory(int64_t bytes, const std::string& parts = "");
// What a GPU's memory has free for this back end; nothing on a CPU, or where no GPU is here.
std::optional<int64_t> gpu_memory_available(const Backend& backend);
// The same refusal for a GPU's memory, where it is known.
void require_gpu_memory(int64_t bytes, const std::optional<int64_t>& available,
                        const std::string& parts);

// The state of a run as global tensors: "param.<name>", "adamw.exp_avg.<name>", "adamw.exp_avg_sq.<name>".
// Pointers go to the engine's memory.
std::vector<StateTensor> state_tensors(TrainEngine& engine);
// Reads all of it and then `residuals` (RankDistribution::loaded_residuals), or the parameters alone.
// DataError if the checkpoint holds another model.
void load_state(TrainEngine& engine, CheckpointReader& reader, bool with_optimizer,
                const std::vector<StateSlice>& residuals = {});
// Fills the parameters from a Hugging Face folder.
HfOrigin load_hf_parameters(TrainEngine& engine, const std::string& folder);

// A run folder's newest verified checkpoint, or the step folder that `path` is; logs rejected ones.
// NotFoundError if there is none.
VerifiedCheckpoint find_checkpoint(const std::string& path);

}  // namespace dstrain
