#include "core/config/availability.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/base/error.h"
#include "core/config/layout.h"

namespace dstrain {

std::vector<Unavailable> unavailable_features(const Config& c, const BuildCapabilities& build) {
  std::vector<Unavailable> missing;
  const auto add = [&](std::string key, std::string value, std::string sentence) {
    missing.push_back({std::move(key), std::move(value), std::move(sentence)});
  };
  const int64_t ranks = std::max(launch_ranks(c.launch), smallest_mesh(c).ranks());
  if (c.run.device == Device::cuda && !build.cuda)
    add("run.device", "cuda", "this build has no CUDA back end; run.device: cpu works");
  else if (c.run.device == Device::cuda && ranks > 1 && !build.cuda_ranks)
    add("run.device", "cuda",
        fmt::format("this is a job of {} ranks, and ranks on GPUs exchange data through NCCL, "
                    "which this build does "
                    "not use yet; run.device: cpu works, and so does one rank",
                    ranks));
  const ComputeType compute = c.precision.compute;
  if ((compute == ComputeType::bf16 || compute == ComputeType::tf32) && !build.cuda)
    add("precision.compute", std::string(enum_name(compute)),
        "it needs the CUDA back end, which this build lacks; precision.compute: fp32 works");
  if (c.precision.moments == MomentType::bf16 && !build.bf16_moments)
    add("precision.moments", "bf16", "this build keeps moments in fp32 only");
  for (Unavailable& feature : missing) feature.is_device = true;
  if (c.precision.quantization == Quantization::aware && !build.quantization_aware)
    add("precision.quantization", "aware",
        "training with fake-quantised weights is not built yet; precision.quantization: none "
        "works");

  const auto needs_ranks = [&](const char* key, int64_t value) {
    if (value > 1 && !build.ranks)
      add(key, fmt::to_string(value),
          fmt::format("this build trains on one rank; {}: 1 works", key));
  };
  needs_ranks("parallel.data", c.parallel.data.value);
  needs_ranks("parallel.tensor", c.parallel.tensor);
  needs_ranks("parallel.pipeline", c.parallel.pipeline);
  needs_ranks("parallel.expert", c.parallel.expert);
  needs_ranks("parallel.context", c.parallel.context);
  if (c.compression.method != CompressionMethod::none && !build.compression)
    add("compression.method", std::string(enum_name(c.compression.method)),
        "gradient compression is not built yet; compression.method: none works");
  needs_ranks("launch.ranks", c.launch.ranks.value);
  if (!c.launch.hosts.empty() && !build.ranks)
    add("launch.hosts", fmt::format("[{}]", fmt::join(c.launch.hosts, ", ")),
        "this build trains on one host; leave launch.hosts out");
  if (c.launch.max_restarts != LaunchConfig{}.max_restarts && !build.restarts)
    add("launch.max_restarts", fmt::to_string(c.launch.max_restarts),
        "this build does not start failed ranks again; leave launch.max_restarts out, and start "
        "again with --resume latest");
  return missing;
}

void require_available(const std::vector<Unavailable>& missing) {
  if (missing.empty()) return;
  std::string text = "this build cannot do what the configuration asks for:";
  for (const Unavailable& feature : missing)
    text += fmt::format("\n  {}: {} is not available: {}", feature.key, feature.value,
                        feature.sentence);
  throw ConfigError(text);
}

}  // namespace dstrain
