#include "core/metrics/record_json.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

namespace dstrain {
namespace {

using Json = nlohmann::ordered_json;

Json open_line(const char* level, const char* event, int64_t step, double ts) {
  return {{"ts", ts}, {"level", level}, {"event", event}, {"step", step}};
}

std::string close_line(const Json& line) {
  return line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

void put(Json& line, const std::string& key, double value) {
  if (std::isfinite(value)) {
    line[key] = value;
    return;
  }
  line[key] = nullptr;
  line[key + "_text"] = std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

void put(Json& line, const std::string& key, const std::optional<double>& value) {
  if (value) put(line, key, *value);
}

void put(Json& line, const std::string& key, const std::optional<int64_t>& value) {
  if (value) line[key] = *value;
}

void put(Json& line, const std::string& key, const std::string& value) {
  if (!value.empty()) line[key] = value;
}

void put(Json& line, const std::string& phase, const TrafficRecord& traffic) {
  if (traffic.baseline == 0) return;
  line[phase + "_bytes"] = traffic.sent;
  line[phase + "_fp32_bytes"] = traffic.baseline;
  put(line, phase + "_ms", traffic.ms);
  if (traffic.baseline_between_nodes == 0) return;
  line[phase + "_between_nodes_bytes"] = traffic.sent_between_nodes;
  line[phase + "_between_nodes_fp32_bytes"] = traffic.baseline_between_nodes;
}

// "exposed_ms" and its parts, "exposed_gradients_ms", ...
void put(Json& line, const std::optional<ExposedRecord>& exposed) {
  if (!exposed) return;
  put(line, "exposed_ms", exposed->total_ms());
  for (size_t kind = 0; kind < kCommKinds; ++kind)
    put(line, fmt::format("exposed_{}_ms", kind_name(static_cast<CommKind>(kind))),
        exposed->ms[kind]);
}

}  // namespace

double unix_seconds() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
  return static_cast<double>(ms) / 1000.0;
}

std::string json_line(const StartupInfo& info, double ts) {
  Json line = open_line("info", "start", info.resume_step, ts);
  line["schema"] = 1;
  put(line, "version", info.version);
  put(line, "commit", info.commit);
  put(line, "run", info.run_name);
  put(line, "run_dir", info.run_dir);
  put(line, "resume", info.resume);
  put(line, "device", info.device);
  line["ranks"] = info.ranks;
  line["threads"] = info.threads;
  put(line, "isa", info.isa);
  put(line, "precision", info.precision);
  put(line, "layout", info.layout);
  if (!info.mesh.empty()) line["mesh"] = info.mesh;
  put(line, "parameters_of_rank", info.parameters_of_rank);
  put(line, "parameter_memory", info.parameter_memory);
  put(line, "in_flight", info.in_flight);
  put(line, "expert_buffer", info.expert_buffer);
  put(line, "compression", info.compression);
  put(line, "memory_rank", info.memory_rank);
  put(line, "model", info.model);
  put(line, "parameters_total", info.parameters_total);
  put(line, "parameters_active", info.parameters_active);
  put(line, "flops_per_token", info.flops_per_token);
  Json memory = Json::object();
  for (const MemoryRow& row : info.memory) put(memory, row.owner, row.bytes);
  line["memory_bytes"] = memory;
  put(line, "memory_available_bytes", info.memory_available_bytes);
  put(line, "gpu_available_bytes", info.gpu_available_bytes);
  if (info.communicators) {
    line["communicators"] = info.communicators->count;
    line["communicator_bytes"] = info.communicators->bytes;
  }
  Json data = Json::array();
  for (const DataRow& row : info.data) {
    Json source = {{"split", row.split}, {"source", row.source}};
    put(source, "tokens", row.tokens);
    put(source, "documents", row.documents);
    put(source, "weight", row.weight);
    data.push_back(std::move(source));
  }
  line["data"] = std::move(data);
  line["steps"] = info.steps;
  line["tokens_per_step"] = info.tokens_per_step;
  put(line, "epochs", info.epochs);
  put(line, "optimizer", info.optimizer);
  put(line, "schedule", info.schedule);
  put(line, "checkpoints", info.checkpoints);
  return close_line(line);
}

std::string json_line(const StepRecord& record, double ts) {
  Json line = open_line(record.skipped ? "warning" : "info", "step", record.step, ts);
  line["steps"] = record.steps;
  put(line, "loss", record.loss);
  put(line, "mtp_loss", record.mtp_loss);
  put(line, "grad_norm", record.grad_norm);
  put(line, "lr", record.lr);
  line["tokens"] = record.tokens;
  line["total_tokens"] = record.total_tokens;
  put(line, "tokens_per_s", record.tokens_per_s);
  put(line, "step_ms", record.step_ms);
  if (record.experts) {
    put(line, "load_max_over_mean", record.experts->max_over_mean_worst);
    put(line, "load_max_over_mean_average", record.experts->max_over_mean_average);
    line["dead_experts"] = record.experts->dead_worst;
    put(line, "dead_experts_average", record.experts->dead_average);
    put(line, "balance_loss", record.experts->balance_loss);
  }
  line["skipped"] = record.skipped;
  line["skipped_total"] = record.skipped_total;
  put(line, "data_ms", record.phases.data_ms);
  put(line, "forward_backward_ms", record.phases.forward_backward_ms);
  put(line, "optimizer_ms", record.phases.optimizer_ms);
  put(line, "checkpoint_stall_ms", record.phases.checkpoint_stall_ms);
  if (record.traffic) {
    put(line, "reduce_scatter", record.traffic->reduce_scatter);
    put(line, "all_gather", record.traffic->all_gather);
  }
  put(line, record.exposed);
  put(line, "gflops_per_s", record.gflops_per_s);
  put(line, "mfu", record.mfu);
  return close_line(line);
}

std::string json_line(const EvalRecord& record, double ts) {
  Json line = open_line("info", "eval", record.step, ts);
  line["set"] = record.set;
  put(line, "loss", record.loss);
  put(line, "perplexity", record.perplexity);
  put(line, "bits_per_byte", record.bits_per_byte);
  line["tokens"] = record.tokens;
  put(line, "seconds", record.seconds);
  return close_line(line);
}

std::string json_line(const CheckpointRecord& record, double ts) {
  Json line = open_line(record.ok ? "info" : "warning", "checkpoint", record.step, ts);
  line["ok"] = record.ok;
  put(line, "seconds", record.seconds);
  line["bytes"] = record.bytes;
  put(line, "stall_ms", record.stall_ms);
  put(line, "error", record.error);
  return close_line(line);
}

std::string json_line(const RunSummary& summary, double ts) {
  Json line = open_line("info", "end", summary.step, ts);
  line["outcome"] = summary.outcome;
  line["steps"] = summary.steps;
  line["total_tokens"] = summary.total_tokens;
  put(line, "seconds", summary.seconds);
  put(line, "loss", summary.loss);
  Json evals = Json::array();
  for (const EvalRecord& eval : summary.evals) {
    Json entry = {{"set", eval.set}, {"step", eval.step}};
    put(entry, "loss", eval.loss);
    put(entry, "bits_per_byte", eval.bits_per_byte);
    evals.push_back(std::move(entry));
  }
  line["evals"] = std::move(evals);
  put(line, "tokens_per_s", summary.tokens_per_s);
  put(line, "mfu", summary.mfu);
  line["skipped_total"] = summary.skipped_total;
  put(line, "traffic", summary.traffic);
  if (summary.step_ms > 0) put(line, "step_ms", summary.step_ms);
  put(line, summary.exposed);
  put(line, "checkpoint", summary.checkpoint);
  Json next = Json::array();
  for (const NextCommand& command : summary.next) next.push_back(command.command);
  line["next"] = std::move(next);
  return close_line(line);
}

}  // namespace dstrain
