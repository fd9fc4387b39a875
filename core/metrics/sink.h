// Where records go. A sink turns each record into bytes of one format; the hub hands every record
// to every sink. No method of either throws because a disk is full or a folder is gone: such a sink
// warns once and training goes on.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "core/metrics/run_info.h"
#include "core/metrics/step_record.h"

namespace dstrain {

class MetricsSink {
 public:
  virtual ~MetricsSink() = default;
  virtual void on_start(const StartupInfo& info) = 0;
  virtual void on_step(const StepRecord& record) = 0;
  virtual void on_eval(const EvalRecord& record) = 0;
  virtual void on_checkpoint(const CheckpointRecord& record) = 0;
  virtual void on_end(const RunSummary& summary) = 0;
};

// Owns the sinks. Calls may come from any thread (a save may finish on another one than the steps
// run on) and are passed on one at a time, in the order of add(). Add sinks before the first call.
class MetricsHub final : public MetricsSink {
 public:
  void add(std::unique_ptr<MetricsSink> sink) { sinks_.push_back(std::move(sink)); }

  void on_start(const StartupInfo& info) override {
    each([&](MetricsSink& sink) { sink.on_start(info); });
  }
  void on_step(const StepRecord& record) override {
    each([&](MetricsSink& sink) { sink.on_step(record); });
  }
  void on_eval(const EvalRecord& record) override {
    each([&](MetricsSink& sink) { sink.on_eval(record); });
  }
  void on_checkpoint(const CheckpointRecord& record) override {
    each([&](MetricsSink& sink) { sink.on_checkpoint(record); });
  }
  void on_end(const RunSummary& summary) override {
    each([&](MetricsSink& sink) { sink.on_end(summary); });
  }

 private:
  void each(auto&& call) {
    const std::lock_guard lock(mutex_);
    for (const auto& sink : sinks_) call(*sink);
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<MetricsSink>> sinks_;
};

}  // namespace dstrain
