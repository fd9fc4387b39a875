// Loss on held-out data: every sample once, in file order.
#pragma once

#include <functional>

#include "core/config/config.h"
#include "core/data/batch_stream.h"
#include "core/data/token_dataset.h"
#include "core/metrics/step_record.h"
#include "parallel/rank_job.h"

namespace dstrain {

HostBatch to_host_batch(const HostMicroBatch& batch);

// Host memory that evaluate_dataset needs for its reader.
int64_t evaluation_bytes(const Config& config);

// On all ranks of the job, which all get the result. Mean loss over the targets of the dataset, at most train.eval_batches global batches of it (0: all).
// Bits per byte are total loss over the bytes of the text and given for the whole dataset only; the first
// token of a document is predicted by nothing and costs nothing.
// `at_batch` is called before each micro-batch.
EvalRecord evaluate_dataset(RankJob& job, const Config& config, const TokenDataset& dataset,
                            const DeviceMemory& memory, const std::function<void()>& at_batch = {});

}  // namespace dstrain
