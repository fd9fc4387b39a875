#include "apps/device_choice.h"

#include <fmt/format.h>

#include "core/base/error.h"
#include "cuda/router_limits.h"

namespace dstrain {
namespace {

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

// Why the ranks of the job cannot have a GPU each; empty if they can.
std::string too_few(const JobSize& job, const VisibleGpus& gpus) {
  const std::string silent = job.ranks > 1 && gpus.why_no_ranks ? gpus.why_no_ranks() : "";
  if (!silent.empty()) return silent;
  const bool may_differ = gpus.are_chosen && gpus.count == 1;
  if (job.on_host <= gpus.count || may_differ) return "";
  return fmt::format("a rank needs a GPU of its own, and {} ranks share a host with {} GPU{}",
                     job.on_host, gpus.count, gpus.count == 1 ? "" : "s");
}

// Why the job gets no GPU; empty if it gets one.
std::string why_no_gpu_for(const Config& config, const JobSize& job, const VisibleGpus& gpus) {
  if (config.run.device == Device::cpu) return "run.device is cpu";
  if (gpus.count == 0) return gpus.why_none;
  const std::string reason = too_few(job, gpus);
  return reason.empty() ? unroutable(config.model) : reason;
}

}  // namespace

DeviceChoice choose_device(const Config& config, const JobSize& job, const VisibleGpus& gpus) {
  const std::string reason = why_no_gpu_for(config, job, gpus);
  if (reason.empty()) return {true, ""};
  const std::string of_job = job.ranks > 1 ? fmt::format(" for a job of {} ranks", job.ranks) : "";
  if (config.run.device == Device::cuda)
    throw ConfigError(fmt::format(
        "run.device: cuda cannot be had{}: {}; run.device: auto or cpu trains without "
        "a GPU{}",
        of_job, reason, job.ranks > 1 && gpus.count > 0 ? ", fewer ranks with one" : ""));
  if (const std::string wanted = gpu_precision(config.precision); !wanted.empty())
    throw ConfigError(fmt::format(
        "{} needs a GPU, and this job has none: {}; leave it out, or write fp32", wanted, reason));
  if (config.run.device == Device::cpu || gpus.count == 0) return {};
  return {false, fmt::format("run.device: auto takes the CPU{}: {}", of_job, reason)};
}

bool is_gpu_job(const Config& config, const JobSize& job, const VisibleGpus& gpus) {
  if (config.run.device != Device::automatic) return config.run.device == Device::cuda;
  return !gpu_precision(config.precision).empty() || why_no_gpu_for(config, job, gpus).empty();
}

Config for_any_device(Config config, const VisibleGpus& gpus) {
  if (config.run.device == Device::cuda) config.run.device = Device::automatic;
  if (config.run.device == Device::automatic && gpus.count > 0) return config;
  config.precision.compute = ComputeType::automatic;
  config.precision.moments = MomentType::fp32;
  return config;
}

}  // namespace dstrain
