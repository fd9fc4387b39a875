// Which device a job computes on. A pure function; assemble.h looks at the machine.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "core/config/config.h"

namespace dstrain {

// What this process finds of GPUs.
struct VisibleGpus {
  int64_t count = 0;
  std::string why_none;  // a clause, where the count is 0: "there is no NVIDIA driver"
  // A clause, where ranks on GPUs could not exchange data, else empty; asked of jobs with several
  // ranks alone, since it loads NCCL. Absent: they could.
  std::function<std::string()> why_no_ranks;
  bool are_chosen = false;  // the environment names them: each rank may see others
};

struct JobSize {
  int64_t ranks = 1;
  int64_t on_host = 1;  // of these, on the host that has the most
};

struct DeviceChoice {
  bool gpu = false;
  std::string
      note;  // a sentence without a full stop where run.device: auto leaves GPUs aside; else empty
};

// A rank needs a GPU of its own. ConfigError, a sentence, if run.device is cuda and cannot be had,
// or if precision needs a GPU and the job gets none.
DeviceChoice choose_device(const Config& config, const JobSize& job, const VisibleGpus& gpus);

// Whether the job file asks for what GPUs alone do, or would get one here: what a plan is made for.
bool is_gpu_job(const Config& config, const JobSize& job, const VisibleGpus& gpus);

// What evaluates or continues a run's model takes the devices that are here, whatever the run had:
// run.device becomes auto, and precision what the device does, where a GPU was asked for and none
// can be had.
Config for_any_device(Config config, const VisibleGpus& gpus);

}  // namespace dstrain
