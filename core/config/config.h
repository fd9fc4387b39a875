// The job file as plain structs, one header for each group of sections. Every struct lists its
// fields once, in fields(); that one list is behind YAML loading, --set, `config explain`, `config
// schema`, dumping and the checkpoint stamp. Immutable after validate().
#pragma once

#include "core/config/data_config.h"
#include "core/config/model_config.h"
#include "core/config/parallel_config.h"
#include "core/config/run_config.h"
#include "core/config/train_config.h"

namespace dstrain {

struct Config {
  RunConfig run;
  ModelConfig model;
  DataConfig data;
  TrainConfig train;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  PrecisionConfig precision;
  ParallelConfig parallel;
  CompressionConfig compression;
  CheckpointConfig checkpoint;
  MetricsConfig metrics;
  LaunchConfig launch;

  static void fields(auto& field, auto& c) {
    field("run", c.run, any(), "where outputs go, device, seed");
    field("model", c.model, any(), "architecture, in Hugging Face names");
    field("data", c.data, any(), "tokenizer and token datasets");
    field("train", c.train, any(), "length, batch sizes, recomputation, evaluation");
    field("optimizer", c.optimizer, any(), "update rule");
    field("schedule", c.schedule, any(), "learning rate over steps");
    field("precision", c.precision, any(), "number formats");
    field("parallel", c.parallel, any(), "layout over ranks");
    field("compression", c.compression, any(), "gradient compression");
    field("checkpoint", c.checkpoint, any(), "saving");
    field("metrics", c.metrics, any(), "files that record each step");
    field("launch", c.launch, any(), "starting ranks");
  }
};

}  // namespace dstrain
