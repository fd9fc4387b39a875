#include "core/metrics/tensorboard_sink.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>

#include "core/base/error.h"
#include "core/metrics/record_json.h"

namespace dstrain {
namespace {

// Readers take the files of a folder in the order of their names, hence ten digits of seconds.
std::string create_event_file(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw_errno("cannot create folder", folder, error.value());
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) host[0] = '\0';
  const auto seconds = static_cast<int64_t>(unix_seconds());
  for (int number = 0;; ++number) {
    std::string path = fmt::format("{}/events.out.tfevents.{:010}.{}.{}.{}", folder, seconds,
                                   host[0] != '\0' ? host.data() : "localhost", ::getpid(), number);
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd >= 0) {
      ::close(fd);
      return path;
    }
    if (errno != EEXIST) throw_errno("cannot create", path, errno);
  }
}

std::string file_header(std::optional<int64_t> resume_step) {
  std::string header = tensorboard_version_record(unix_seconds());
  if (resume_step) header += tensorboard_restart_record(unix_seconds(), *resume_step + 1);
  return header;
}

// A Scalar does not own its tag.
struct TrafficTags {
  const char *sent, *baseline, *ms, *sent_between_nodes, *baseline_between_nodes;
};
constexpr TrafficTags kReduceScatterTags = {
    "traffic/reduce_scatter_bytes", "traffic/reduce_scatter_fp32_bytes", "time/reduce_scatter_ms",
    "traffic/reduce_scatter_between_nodes_bytes",
    "traffic/reduce_scatter_between_nodes_fp32_bytes"};
constexpr TrafficTags kAllGatherTags = {
    "traffic/all_gather_bytes", "traffic/all_gather_fp32_bytes", "time/all_gather_ms",
    "traffic/all_gather_between_nodes_bytes", "traffic/all_gather_between_nodes_fp32_bytes"};

void add(std::vector<Scalar>& scalars, const TrafficTags& tags, const TrafficRecord& traffic) {
  if (traffic.baseline == 0) return;
  scalars.push_back({tags.sent, static_cast<double>(traffic.sent)});
  scalars.push_back({tags.baseline, static_cast<double>(traffic.baseline)});
  scalars.push_back({tags.ms, traffic.ms});
  if (traffic.baseline_between_nodes == 0) return;
  scalars.push_back({tags.sent_between_nodes, static_cast<double>(traffic.sent_between_nodes)});
  scalars.push_back(
      {tags.baseline_between_nodes, static_cast<double>(traffic.baseline_between_nodes)});
}

}  // namespace

TensorBoardSink::TensorBoardSink(const std::string& folder, std::optional<int64_t> resume_step)
    : file_(create_event_file(folder), file_header(resume_step)) {}

void TensorBoardSink::write(int64_t step, const std::vector<Scalar>& scalars) {
  file_.append(tensorboard_scalars_record(unix_seconds(), step, scalars));
}

void TensorBoardSink::on_step(const StepRecord& record) {
  std::vector<Scalar> scalars = {
      {"train/loss", record.loss},
      {"train/grad_norm", record.grad_norm},
      {"train/lr", record.lr},
      {"train/tokens_per_s", record.tokens_per_s},
      {"train/total_tokens", static_cast<double>(record.total_tokens)},
      {"train/skipped_total", static_cast<double>(record.skipped_total)},
      {"time/step_ms", record.step_ms},
      {"time/data_ms", record.phases.data_ms},
      {"time/forward_backward_ms", record.phases.forward_backward_ms},
      {"time/optimizer_ms", record.phases.optimizer_ms},
      {"time/checkpoint_stall_ms", record.phases.checkpoint_stall_ms},
  };
  if (record.mtp_loss) scalars.push_back({"train/mtp_loss", *record.mtp_loss});
  if (record.gflops_per_s) scalars.push_back({"train/gflops_per_s", *record.gflops_per_s});
  if (record.mfu) scalars.push_back({"train/mfu", *record.mfu});
  if (record.experts) {
    const ExpertLoad& experts = *record.experts;
    scalars.push_back({"moe/load_max_over_mean", experts.max_over_mean_worst});
    scalars.push_back({"moe/load_max_over_mean_average", experts.max_over_mean_average});
    scalars.push_back({"moe/dead_experts", static_cast<double>(experts.dead_worst)});
    scalars.push_back({"moe/dead_experts_average", experts.dead_average});
    scalars.push_back({"moe/balance_loss", experts.balance_loss});
  }
  if (record.traffic) {
    add(scalars, kReduceScatterTags, record.traffic->reduce_scatter);
    add(scalars, kAllGatherTags, record.traffic->all_gather);
  }
  std::vector<std::string> tags;  // that the scalars point to
  if (record.exposed) {
    tags.reserve(kCommKinds);
    scalars.push_back({"time/exposed_ms", record.exposed->total_ms()});
    for (size_t kind = 0; kind < kCommKinds; ++kind) {
      if (!record.exposed->ms[kind]) continue;
      tags.push_back(fmt::format("time/exposed_{}_ms", kind_name(static_cast<CommKind>(kind))));
      scalars.push_back({tags.back(), *record.exposed->ms[kind]});
    }
  }
  write(record.step, scalars);
}

void TensorBoardSink::on_eval(const EvalRecord& record) {
  const std::string loss = "eval/" + record.set + "/loss";
  const std::string perplexity = "eval/" + record.set + "/perplexity";
  const std::string bits = "eval/" + record.set + "/bits_per_byte";
  std::vector<Scalar> scalars = {{loss, record.loss}, {perplexity, record.perplexity}};
  if (record.bits_per_byte) scalars.push_back({bits, *record.bits_per_byte});
  write(record.step, scalars);
}

void TensorBoardSink::on_checkpoint(const CheckpointRecord& record) {
  write(record.step, {{"checkpoint/ok", record.ok ? 1.0 : 0.0},
                      {"checkpoint/seconds", record.seconds},
                      {"checkpoint/bytes", static_cast<double>(record.bytes)},
                      {"checkpoint/stall_ms", record.stall_ms}});
}

}  // namespace dstrain
