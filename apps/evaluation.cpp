#include "apps/evaluation.h"

#include <chrono>
#include <cmath>
#include <numbers>

#include "core/base/file.h"

namespace dstrain {
namespace {

constexpr int64_t kEvaluationSlots = 2;

}  // namespace

HostBatch to_host_batch(const HostMicroBatch& batch) {
  return {batch.sequences, batch.seq_len,         batch.tokens_T,    batch.positions_T,
          batch.targets_T, batch.segment_offsets, batch.num_segments};
}

int64_t evaluation_bytes(const Config& config) {
  return kEvaluationSlots * BatchStream::slot_bytes(config.train.micro_batch, config.data.seq_len);
}

EvalRecord evaluate_dataset(RankJob& job, const Config& config, const TokenDataset& dataset,
                            const DeviceMemory& memory, const std::function<void()>& at_batch) {
  const auto begin = std::chrono::steady_clock::now();
  BatchStreamOptions options;
  options.pack = {config.data.seq_len, config.data.document_mask, false, 0};
  options.vocab_size = config.model.vocab_size;
  options.micro_batch = config.train.micro_batch;
  options.global_batch = config.train.global_batch;
  options.dp_rank = job.mesh().place().data.rank;
  options.dp_size = job.mesh().place().data.size;
  options.single_pass = true;
  BatchStream stream({{&dataset, 1.0}}, options, memory.data(), memory.bytes());
  const int64_t limit = config.train.eval_batches;
  const int64_t steps = limit > 0 ? std::min(limit, stream.num_steps()) : stream.num_steps();

  EvalRecord record;
  job.engine().begin_evaluation();
  for (int64_t i = 0; i < steps; ++i)
    job.runner().evaluate(stream.micro_batches_per_step(), [&](int64_t m) {
      if (at_batch) at_batch();
      const HostMicroBatch& batch = stream.next();
      if (m == 0) record.tokens += batch.step_valid_tokens;
      job.engine().load(m, to_host_batch(batch));
      stream.release();
    });
  const double loss = job.engine().finish_evaluation();
  record.set = file_name(dataset.path());
  record.loss = record.tokens > 0 ? loss / static_cast<double>(record.tokens) : 0.0;
  record.perplexity = std::exp(record.loss);
  if (steps == stream.num_steps() && dataset.text_bytes() > 0)
    record.bits_per_byte = loss / std::numbers::ln2 / static_cast<double>(dataset.text_bytes());
  record.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return record;
}

}  // namespace dstrain
