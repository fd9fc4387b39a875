// Records as JSON, one object a line: what metrics.jsonl holds and what --log-json prints.
// Every line starts with ts (seconds since 1970), level, event and step. event is one of start,
// step, eval, checkpoint, end. A number that is not finite is null, with a second key "<key>_text"
// that holds "nan", "inf" or "-inf". All other doubles read back to the same bits.
#pragma once

#include <string>

#include "core/metrics/run_info.h"
#include "core/metrics/step_record.h"

namespace dstrain {

// Seconds since 1970, to the millisecond.
double unix_seconds();

// One line with its newline. `ts` is written as given.
std::string json_line(const StartupInfo& info, double ts);
std::string json_line(const StepRecord& record, double ts);
std::string json_line(const EvalRecord& record, double ts);
std::string json_line(const CheckpointRecord& record, double ts);
std::string json_line(const RunSummary& summary, double ts);

}  // namespace dstrain
