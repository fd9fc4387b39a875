#include "apps/device_choice.h"

#include <fmt/format.h>

#include "core/base/error.h"
#include "cuda/router_limits.h"

namespace dstrain {
namespace {

// What stands between several ranks and GPUs.
constexpr const char* kNoRanks =
    "ranks on GPUs exchange data through NCCL, which this version does not use yet";

// The key and value of `precision` that no CPU can follow; empty if there is none.
std::string gpu_precision(const PrecisionConfig& precision) {
  if (precision.compute == ComputeType::bf16 || precision.compute == ComputeType::tf32)
    return fmt::format("precision.compute: {}", enum_name(precision.compute));
  if (precision.moments == MomentType::bf16) return "precision.moments: bf16";
  return "";
}

// Why a GPU cannot route this model's tokens; empty if it can.
std::string unroutable(const ModelConfig& model) {
  const auto over = [](const char* key, int64_t value, int64_t most) {
    return value > most
               ? fmt::format("model.{} is {}, and a GPU takes at most {}", key, value, most)
               : std::string();
  };
  for (std::string reason :
       {over("n_routed_experts", model.n_routed_experts, kMostExperts),
        over("num_experts_per_tok", model.num_experts_per_tok, kMostExpertsOfToken),
        over("n_group", model.n_group, kMostExpertGroups)})
    if (!reason.empty()) return reason;
  return "";
}

// Why the job gets no GPU; empty if it gets one.
std::string why_no_gpu_for(const Config& config, int64_t ranks, const VisibleGpus& gpus) {
  if (config.run.device == Device::cpu) return "run.device is cpu";
  if (gpus.count == 0) return gpus.why_none;
  if (ranks > 1) return kNoRanks;
  return unroutable(config.model);
}

}  // namespace

DeviceChoice choose_device(const Config& config, int64_t ranks, const VisibleGpus& gpus) {
  const std::string reason = why_no_gpu_for(config, ranks, gpus);
  if (reason.empty()) return {true, ""};
  if (config.run.device == Device::cuda && gpus.count > 0 && ranks > 1)
    throw ConfigError(fmt::format(
        "run.device: cuda is not available to a job of {} ranks: {}; run.device: cpu works, and "
        "so does one rank",
        ranks, reason));
  if (config.run.device == Device::cuda)
    throw ConfigError(
        fmt::format("run.device: cuda cannot be had: {}; run.device: auto or cpu trains without a "
                    "GPU",
                    reason));
  if (const std::string wanted = gpu_precision(config.precision); !wanted.empty())
    throw ConfigError(fmt::format(
        "{} needs a GPU, and this job has none: {}; leave it out, or write fp32", wanted, reason));
  if (config.run.device == Device::cpu || gpus.count == 0) return {};
  const std::string job = ranks > 1 ? fmt::format(" for a job of {} ranks", ranks) : "";
  return {false, fmt::format("run.device: auto takes the CPU{}: {}", job, reason)};
}

bool is_gpu_job(const Config& config, int64_t ranks, const VisibleGpus& gpus) {
  if (config.run.device != Device::automatic) return config.run.device == Device::cuda;
  return !gpu_precision(config.precision).empty() || (gpus.count > 0 && ranks == 1);
}

Config for_any_device(Config config, const VisibleGpus& gpus) {
  if (config.run.device == Device::cuda) config.run.device = Device::automatic;
  if (config.run.device == Device::automatic && gpus.count > 0) return config;
  config.precision.compute = ComputeType::automatic;
  config.precision.moments = MomentType::fp32;
  return config;
}

}  // namespace dstrain
