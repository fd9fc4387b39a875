// <run>/tensorboard/events.out.tfevents.*: scalars over steps, one file per process, for
// `tensorboard --logdir`. Tags: train/*, time/*, moe/*, eval/<set>/*, checkpoint/*.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/metrics/record_file.h"
#include "core/metrics/sink.h"
#include "core/metrics/tensorboard_events.h"

namespace dstrain {

class TensorBoardSink final : public MetricsSink {
 public:
  // Creates `folder` and its parents where needed, and a new file in it. With the step of the
  // checkpoint that the run goes on from, points past it in earlier files are declared void.
  // Throws if either cannot be created.
  TensorBoardSink(const std::string& folder, std::optional<int64_t> resume_step);

  void on_start(const StartupInfo&) override {}
  void on_step(const StepRecord& record) override;
  void on_eval(const EvalRecord& record) override;
  void on_checkpoint(const CheckpointRecord& record) override;
  void on_end(const RunSummary&) override {}

  const std::string& path() const { return file_.path(); }

 private:
  void write(int64_t step, const std::vector<Scalar>& scalars);

  RecordFile file_;
};

}  // namespace dstrain
