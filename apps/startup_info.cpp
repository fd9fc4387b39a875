#include "apps/startup_info.h"

#include "apps/assemble.h"
#include "apps/evaluation.h"
#include "build_info.h"
#include "core/backend/cpu_backend.h"
#include "core/checkpoint/async_saver.h"
#include "core/metrics/report.h"
#include "core/model/cost.h"

namespace dstrain {

StartupInfo startup_info_of(const Config& config, TrainEngine* engine) {
  StartupInfo info;
  info.version = DSTRAIN_VERSION;
  info.commit = DSTRAIN_COMMIT;
  info.run_name = config.run.name;
  info.run_dir = RunPaths(config).folder;
  info.threads = config.run.threads > 0 ? config.run.threads : available_cores();
  info.device = config.run.device == Device::cuda ? "cuda" : "cpu";
  if (config.run.device != Device::cuda) info.isa = check_instruction_set();
  info.model = describe_model(config.model);
  if (config.model.vocab_size > 0) {
    const ModelCost cost = model_cost(config.model, config.data.seq_len);
    info.parameters_total = cost.parameters_total;
    info.parameters_active = cost.parameters_active;
    info.flops_per_token = cost.flops_per_token;
  }
  if (engine) {
    info.precision = precision_name(engine->options());
    for (const MemoryOwner& owner : engine->memory())
      info.memory.push_back({owner.name, owner.bytes});
    if (config.checkpoint.async)
      info.memory.push_back(
          {"checkpoint snapshot", AsyncSaver::snapshot_bytes(state_tensors(*engine))});
    const int64_t slot = BatchStream::slot_bytes(config.train.micro_batch, config.data.seq_len);
    const int64_t evaluation = config.data.valid.empty() ? 0 : evaluation_bytes(config);
    info.memory.push_back({"input batches", slot * config.data.prefetch + evaluation});
  }
  const int64_t available = available_memory_bytes();
  if (available > 0) info.memory_available_bytes = available;
  info.steps = config.train.steps;
  info.tokens_per_step = config.train.global_batch * config.data.seq_len;
  info.optimizer = describe_optimizer(config.optimizer);
  info.schedule = describe_schedule(config.schedule, config.optimizer.lr, config.train.steps);
  info.checkpoints = describe_checkpoints(config.checkpoint);
  return info;
}

DataRow data_row(const char* split, const DataSourceConfig& source, const TokenDataset* dataset) {
  DataRow row{split, source.path, {}, {}, source.weight};
  if (dataset) {
    row.tokens = dataset->num_tokens();
    row.documents = dataset->num_documents();
  }
  return row;
}

std::optional<double> epochs_of(const StartupInfo& info) {
  int64_t tokens = 0;
  for (const DataRow& row : info.data) {
    if (row.split != "train") continue;
    if (!row.tokens) return std::nullopt;
    tokens += *row.tokens;
  }
  if (tokens == 0) return std::nullopt;
  return static_cast<double>(info.steps) * static_cast<double>(info.tokens_per_step) /
         static_cast<double>(tokens);
}

}  // namespace dstrain
