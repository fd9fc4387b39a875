#include "apps/startup_info.h"

#include <fmt/format.h>

#include <cstdlib>
#include <sstream>

#include "apps/assemble.h"
#include "apps/evaluation.h"
#include "build_info.h"
#include "core/backend/cpu_backend.h"
#include "core/base/format_units.h"
#include "core/checkpoint/async_saver.h"
#include "core/metrics/report.h"
#include "core/model/cost.h"
#include "parallel/nccl_communicator.h"

namespace dstrain {
namespace {

// The drawing without its first line, which the table has elsewhere, and without its indent.
std::vector<std::string> mesh_lines(const Config& config, const MeshShape& shape) {
  std::istringstream text(draw_mesh(config, shape));
  std::vector<std::string> lines;
  std::string line;
  std::getline(text, line);
  while (std::getline(text, line)) lines.push_back(line.substr(2));
  return lines;
}

std::string in_flight_text(const EngineOptions& options) {
  std::string text;
  for (const EngineChunk& chunk : options.chunks)
    text += fmt::format("{}{}", text.empty() ? "" : " + ", chunk.in_flight);
  const bool is_one = options.chunks.size() == 1 && options.chunks[0].in_flight == 1;
  return fmt::format("activations of {} micro-batch{}", text, is_one ? "" : "es") +
         (options.chunks.size() > 1 ? ", by model chunk of the stage" : "");
}

std::string expert_buffer_text(const Config& config, RankJob& job) {
  const RankPlace& place = job.mesh().place();
  if (place.expert.size == 1) return "";
  const int64_t tokens =
      config.train.micro_batch * config.data.seq_len / (place.context.size * place.tensor.size);
  const int64_t rows =
      job.distribution().dispatcher().max_rows(tokens, config.model.num_experts_per_tok);
  return fmt::format("{} rows of {}, {} experts on this rank", format_grouped(rows),
                     config.model.hidden_size, config.model.n_routed_experts / place.expert.size);
}

std::string compression_text(RankJob& job) {
  if (const AutoCompression* chooser = job.distribution().auto_compression())
    return chooser->describe();
  return "auto: ranks choose once they have measured their sums; planned as if all were compressed";
}

void add_layout(StartupInfo& info, const Config& config, RankJob& job) {
  const MeshShape& shape = job.mesh().shape();
  info.ranks = shape.ranks();
  if (info.ranks == 1) return;
  info.layout = fmt::format("{}, ZeRO-{}", to_text(shape), config.parallel.zero);
  info.mesh = mesh_lines(config, shape);
  int64_t parameters = 0;
  for (int chunk = 0; chunk < job.engine().num_chunks(); ++chunk)
    for (const Parameter& p : job.engine().parameters(chunk).all())
      if (p.spec.trainable) parameters += p.numel();
  info.parameters_of_rank = parameters;
  const ShardBytes bytes = job.distribution().parameter_bytes();
  info.parameter_memory = fmt::format("{} = {}", describe(bytes), format_bytes(bytes.total()));
  info.in_flight = in_flight_text(job.engine().options());
  info.expert_buffer = expert_buffer_text(config, job);
  if (config.compression.method == CompressionMethod::automatic)
    info.compression = compression_text(job);
}

std::vector<MemoryRow> memory_rows(const Config& config, TrainEngine& engine) {
  std::vector<MemoryRow> rows;
  const bool on_cpu = engine.backend().is_cpu();
  for (const MemoryOwner& owner : engine.memory())
    rows.push_back({owner.name, owner.bytes, !on_cpu && owner.kind == MemoryKind::device});
  // A GPU that is not here does not tell what its operations take.
  if (!on_cpu && rows.back().bytes == 0) rows.back().bytes.reset();
  if (config.checkpoint.async || !on_cpu)
    rows.push_back({"checkpoint snapshot", AsyncSaver::snapshot_bytes(state_tensors(engine))});
  const int64_t slot = BatchStream::slot_bytes(config.train.micro_batch, config.data.seq_len);
  const int64_t evaluation = config.data.valid.empty() ? 0 : evaluation_bytes(config);
  rows.push_back({"input batches", slot * config.data.prefetch + evaluation});
  return rows;
}

std::optional<CommunicatorMemory> communicator_memory(ProcessMesh& mesh) {
  const bool is_planned = mesh.is_planned();
  const NcclMemory memory =
      is_planned ? planned_nccl_memory(mesh, std::getenv) : nccl_memory(mesh.world());
  if (memory.communicators == 0) return std::nullopt;
  return CommunicatorMemory{memory.communicators, memory.bytes, !is_planned};
}

}  // namespace

StartupInfo startup_info_of(const Config& config, RankJob* job) {
  StartupInfo info;
  info.version = DSTRAIN_VERSION;
  info.commit = DSTRAIN_COMMIT;
  info.run_name = config.run.name;
  info.run_dir = RunPaths(config).folder;
  info.threads = config.run.threads > 0 ? config.run.threads : available_cores();
  const bool on_gpu = job ? !job->engine().backend().is_cpu() : config.run.device == Device::cuda;
  info.device = on_gpu ? "cuda" : "cpu";
  if (!on_gpu) info.isa = check_instruction_set();
  info.model = describe_model(config.model);
  if (config.model.vocab_size > 0) {
    const ModelCost cost = model_cost(config.model, config.data.seq_len);
    info.parameters_total = cost.parameters_total;
    info.parameters_active = cost.parameters_active;
    info.flops_per_token = cost.flops_per_token;
  }
  if (job) {
    if (on_gpu) info.device = job->engine().backend().describe();
    info.gpu_available_bytes = gpu_memory_available(job->engine().backend());
    info.precision = precision_name(config, job->engine().options());
    info.memory = memory_rows(config, job->engine());
    if (on_gpu) info.communicators = communicator_memory(job->mesh());
    add_layout(info, config, *job);
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

std::string largest_memory_part(const StartupInfo& info, bool on_gpu) {
  const MemoryRow* largest = nullptr;
  for (const MemoryRow& row : info.memory)
    if (row.on_gpu == on_gpu && row.bytes && (!largest || *row.bytes > *largest->bytes))
      largest = &row;
  if (!largest) return "";
  const char* grows_with = largest->owner == "workspace" ? ", which grows with run.threads" : "";
  return fmt::format("; the largest part is {}, {} of each rank{}", largest->owner,
                     format_bytes(*largest->bytes), grows_with);
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
