// The sections `run`, `checkpoint` and `metrics`: where a run lives and what it writes there.
#pragma once

#include <cstdint>
#include <string>

#include "core/config/field.h"

namespace dstrain {

enum class Device { automatic, cpu, cuda };
DSTRAIN_ENUM_NAMES(Device, {Device::automatic, "auto"}, {Device::cpu, "cpu"},
                   {Device::cuda, "cuda"});

struct RunConfig {
  std::string name;  // outputs go to <dir>/<name>
  std::string dir = "runs";
  int64_t seed = 42;
  Device device = Device::automatic;
  bool deterministic = false;
  int64_t threads = 0;  // per rank; 0 = the cores this process may use, shared by the local ranks

  static void fields(auto& field, auto& c) {
    field("name", c.name, required(), "name of the run; outputs go to <run.dir>/<run.name>");
    field("dir", c.dir, any(), "folder that holds all runs");
    field("seed", c.seed, at_least(0), "seed of initialisation and sample order");
    field("device", c.device, any(), "where tensors live: auto takes a GPU if one is visible");
    field("deterministic", c.deterministic, any(),
          "repeat bits on a GPU too, at some cost; a CPU always does");
    field("threads", c.threads, in_range(0, 4096), "compute threads per rank; 0 means all cores");
  }
};

struct CheckpointConfig {
  int64_t every = 1000;  // steps; 0 = only at the end and on signals
  bool at_end = true;
  int64_t keep = 3;
  bool async = true;
  int64_t max_failed_saves = 3;

  static void fields(auto& field, auto& c) {
    field("every", c.every, at_least(0),
          "steps between checkpoints; 0 saves at the end and on signals only");
    field("at_end", c.at_end, any(),
          "save the last state of a run that reaches train.steps; false is for trials: what a "
          "signal stops is saved in any case");
    field("keep", c.keep, at_least(1),
          "checkpoints that retention keeps; the last verified two always stay");
    field("async", c.async, any(), "write from a snapshot while training goes on");
    field("max_failed_saves", c.max_failed_saves, at_least(1),
          "failed saves in a row after which the run stops");
  }
};

struct MetricsConfig {
  bool jsonl = true;
  bool tensorboard = true;

  static void fields(auto& field, auto& c) {
    field("jsonl", c.jsonl, any(), "write <run>/metrics.jsonl");
    field("tensorboard", c.tensorboard, any(),
          "write TensorBoard event files to <run>/tensorboard");
  }
};

}  // namespace dstrain
