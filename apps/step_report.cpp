#include "apps/step_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "core/base/format_units.h"
#include "core/model/cost.h"

namespace dstrain {
namespace {

constexpr double kPeakFlops = 989.4e12;  // of an H100 SXM, as sold: dense bf16 products

double rounded(double x, int digits) {
  const double scale = std::pow(10.0, digits);
  return std::round(x * scale) / scale;
}

// ": gradients 1.2 ms, experts 3.4 ms", of the kinds that there are.
std::string kinds_text(const ExposedRecord& exposed) {
  std::string text;
  for (int kind = 0; kind < kCommKinds; ++kind)
    if (const auto& ms = exposed.ms[static_cast<size_t>(kind)])
      text += fmt::format("{} {} {:.1f} ms", text.empty() ? ":" : ",",
                          kind_name(static_cast<CommKind>(kind)), *ms);
  return text;
}

using Row = std::pair<std::string, OpTotal>;

// The longest first.
std::vector<Row> rows_of(const std::map<std::string, OpTotal>& profile, const std::string& filter) {
  std::vector<Row> rows;
  for (const auto& row : profile)
    if (row.first.find(filter) != std::string::npos) rows.emplace_back(row);
  std::sort(rows.begin(), rows.end(),
            [](const Row& a, const Row& b) { return a.second.seconds > b.second.seconds; });
  return rows;
}

}  // namespace

StepReport::StepReport(const Config& config, const StepBenchResult& result)
    : config_(config),
      result_(result),
      gpu_(result.on_gpu),
      step_(result.step_seconds[result.step_seconds.size() / 2]),
      tokens_(static_cast<double>(config.train.global_batch * config.data.seq_len) /
              static_cast<double>(result.ranks)),
      flops_(result.flops / static_cast<double>(result.ranks)),
      parameters_(
          static_cast<double>(model_cost(config.model, config.data.seq_len).parameters_total)) {}

std::string StepReport::heading() const {
  const std::string ranks = result_.ranks == 1 ? "" : to_text(result_.mesh) + ", each ";
  return fmt::format("{} parameters, {} x {} tokens in micro-batches of {}, {}, {}{}\n",
                     format_count(parameters_), config_.train.global_batch, config_.data.seq_len,
                     config_.train.micro_batch, result_.precision, ranks, result_.device);
}

std::string StepReport::text() const {
  const StepBenchResult& r = result_;
  std::string out = heading();
  out += fmt::format(
      "step            {:8.1f} ms   median of {} (fastest {:.1f})   {} tokens/s   {}/s{}{}\n",
      1e3 * step_, r.step_seconds.size(), 1e3 * r.step_seconds.front(),
      format_count(tokens_ / step_), format_flops(flops_ / step_), r.ranks > 1 ? " a rank" : "",
      gpu_ ? fmt::format("   {:.1f} % of 989 TFLOP/s", 100 * flops_ / step_ / kPeakFlops) : "");
  if (r.exposed)
    out += fmt::format("communication   {:8.1f} ms   {:.1f} % of the step not hidden{}\n",
                       r.exposed->total_ms(), 0.1 * r.exposed->total_ms() / step_,
                       kinds_text(*r.exposed));
  if (products_)
    out += fmt::format(
        "its products    {:8.1f} ms   {} calls of the library alone; the step takes {:.2f} x "
        "that\n",
        1e3 * products_->seconds, products_->calls, step_ / products_->seconds);
  if (gpu_)
    out += fmt::format(
        "host            {:8.1f} ms   {:.1f} % of the step; first step done {:.1f} s after the "
        "start\n",
        1e3 * r.host_seconds, 100 * r.host_seconds / step_, r.startup_seconds);
  out += gpu_ ? fmt::format("memory          {} planned\n", format_bytes(r.plan_bytes))
              : fmt::format("memory          {} planned, {} private after the steps\n",
                            format_bytes(r.plan_bytes),
                            format_bytes(r.private_after - r.private_before));
  return r.profile.empty() ? out : out + "\n" + operations_text("");
}

std::string StepReport::operations_text(const std::string& filter) const {
  const Ceilings& ceilings = result_.ceilings;
  const double unit = gpu_ ? 1e-12 : 1e-9;
  const std::string prefix = gpu_ ? "T" : "G";
  const std::vector<Row> rows = rows_of(result_.profile, filter);
  double sum = 0, least = 0;
  for (const auto& [name, total] : rows) {
    sum += total.seconds;
    least += ceilings.least_seconds(total.flops, total.bytes);
  }
  std::string out = fmt::format("{:<38} {:>6} {:>9} {:>6} {:>9} {:>7} {:>8}\n", "operation",
                                "calls", "ms", "%", prefix + "FLOP/s", prefix + "B/s", "ceiling");
  for (const auto& [name, total] : rows)
    out += fmt::format(
        "{:<38} {:>6} {:>9.3f} {:>6.1f} {:>9} {:>7.2f} {:>6.0f} %\n", name, total.calls,
        1e3 * total.seconds, 100 * total.seconds / sum,
        total.flops > 0 ? fmt::format("{:.1f}", unit * total.flops / total.seconds) : "",
        unit * total.bytes / total.seconds,
        100 * ceilings.least_seconds(total.flops, total.bytes) / total.seconds);
  out += fmt::format("{:<38} {:>6} {:>9.3f} {:>32.0f} %\n", "sum", "", 1e3 * sum,
                     sum > 0 ? 100 * least / sum : 0);
  return out +
         fmt::format(
             "ceilings of this device, measured: products {:.1f} {}FLOP/s, copy {:.2f} {}B/s\n",
             unit * ceilings.flops, prefix, unit * ceilings.bytes, prefix);
}

std::string StepReport::operations_json(const std::string& filter) const {
  const Ceilings& ceilings = result_.ceilings;
  std::string out;
  for (const auto& [name, total] : rows_of(result_.profile, filter))
    out +=
        nlohmann::ordered_json{
            {"operation", name},
            {"calls", total.calls},
            {"ms", 1e3 * total.seconds},
            {"tflops", 1e-12 * total.flops / total.seconds},
            {"tb_per_s", 1e-12 * total.bytes / total.seconds},
            {"share_of_ceiling", ceilings.least_seconds(total.flops, total.bytes) / total.seconds},
            {"ceiling_tflops", 1e-12 * ceilings.flops},
            {"ceiling_tb_per_s", 1e-12 * ceilings.bytes},
            {"device", result_.device}}
            .dump() +
        "\n";
  return out;
}

std::string StepReport::json() const {
  const StepBenchResult& r = result_;
  const double gib = static_cast<double>(int64_t{1} << 30);
  nlohmann::ordered_json json = {
      {"peer", gpu_ ? "deepseek-train" : "deepseek-train cpu"},
      {"precision", r.precision},
      {"recompute", r.recompute},
      {"zero", r.ranks > 1 ? config_.parallel.zero : 0},
      {"layers", config_.model.num_hidden_layers},
      {"params_b", rounded(parameters_ / 1e9, 3)},
      {"world", r.ranks},
      {"micro_batch", config_.train.micro_batch},
      {"accumulation", micro_batches_per_step(config_, r.mesh)},
      {"seq", config_.data.seq_len},
      {"step_ms", rounded(1e3 * step_, 2)},
      {"tokens_per_s_per_gpu", rounded(tokens_ / step_, gpu_ ? 0 : 2)},
      {"model_tflops_per_gpu", rounded(1e-12 * flops_ / step_, gpu_ ? 1 : 4)},
      {"mfu_989", rounded(flops_ / step_ / kPeakFlops, 4)},
      {"peak_gib", rounded(static_cast<double>(r.plan_bytes) / gib, 2)},
      {"loss", r.loss},
      {"step_ms_fastest", 1e3 * r.step_seconds.front()},
      {"device", r.device}};
  if (products_) {
    json["threads"] = config_.run.threads > 0 ? config_.run.threads : available_cores();
    json["products_ms"] = 1e3 * products_->seconds;
    json["step_over_products"] = step_ / products_->seconds;
    json["private_bytes"] = r.private_after - r.private_before;
  }
  if (gpu_) {
    json["host_ms"] = rounded(1e3 * r.host_seconds, 2);
    json["startup_s"] = rounded(r.startup_seconds, 2);
  }
  if (r.exposed) {
    json["layout"] = to_text(r.mesh);
    json["exposed_ms"] = rounded(r.exposed->total_ms(), 2);
    json["exposed_share"] = rounded(1e-3 * r.exposed->total_ms() / step_, 4);
    for (int kind = 0; kind < kCommKinds; ++kind)
      if (const auto& ms = r.exposed->ms[static_cast<size_t>(kind)])
        json["exposed"][kind_name(static_cast<CommKind>(kind))] = rounded(*ms, 2);
  }
  for (const auto& [name, total] : r.profile)
    json["profile"][name] = {{"calls", total.calls},
                             {"ms", 1e3 * total.seconds},
                             {"flops", total.flops},
                             {"bytes", total.bytes}};
  return json.dump();
}

}  // namespace dstrain
