// The start-up table's facts, as far as a configuration alone tells them.
#pragma once

#include <optional>

#include "core/config/config.h"
#include "core/data/token_dataset.h"
#include "core/metrics/run_info.h"
#include "parallel/rank_job.h"

namespace dstrain {

// job may be null (--dry-run of something this build cannot run): memory and layout are then
// unknown. What differs between ranks is that of the job's rank.
StartupInfo startup_info_of(const Config& config, RankJob* job);

// "; the largest part is optimizer state, 16.0 GiB of each rank": what does not shrink with the
// batch should not be looked for there. Empty where nothing is planned.
std::string largest_memory_part(const StartupInfo& info, bool on_gpu);

// dataset may be null (--dry-run without it): its size is then unknown.
DataRow data_row(const char* split, const DataSourceConfig& source, const TokenDataset* dataset);
// How often the run reads its training data; nothing if the size of a source is unknown.
std::optional<double> epochs_of(const StartupInfo& info);

}  // namespace dstrain
