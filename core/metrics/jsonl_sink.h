// <run>/metrics.jsonl: every record as one JSON line (see record_json.h), written at once.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/metrics/record_file.h"
#include "core/metrics/sink.h"

namespace dstrain {

// Makes the file what it was when `step` had been done: keeps the lines whose "step" is at most
// that. The others go, with them the torn last line of a kill and, with a warning that counts them,
// lines that are no JSON. The file is replaced by a rename, so that a kill leaves the old or the
// new one. A missing file is fine. Throws StorageError, PermissionError.
void rewind_jsonl(const std::string& path, int64_t step);

class JsonlSink final : public MetricsSink {
 public:
  // With the step of the checkpoint that the run goes on from, the file is rewound to it and
  // continued, so that it holds each step once. Without one, the run starts and so does the file.
  // Throws if the file cannot be opened or rewound.
  JsonlSink(const std::string& path, std::optional<int64_t> resume_step);

  void on_start(const StartupInfo& info) override;
  void on_step(const StepRecord& record) override;
  void on_eval(const EvalRecord& record) override;
  void on_checkpoint(const CheckpointRecord& record) override;
  void on_end(const RunSummary& summary) override;

 private:
  RecordFile file_;
};

}  // namespace dstrain
