#include "core/metrics/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include "core/base/format_units.h"

namespace dstrain {
namespace {

constexpr size_t kMaxMemoryRows = 9;
constexpr size_t kMaxDataRows = 8;
constexpr size_t kLabelWidth = 15;
constexpr size_t kTextWidth = 80;
constexpr size_t kMaxPathWidth = 44;
constexpr const char* kNotAvailable = "not available";

std::string count_or_not(const std::optional<int64_t>& count) {
  return count ? format_grouped(*count) : kNotAvailable;
}

// The middle of a long path gives way: both ends tell more.
std::string shorten(const std::string& path) {
  if (path.size() <= kMaxPathWidth) return path;
  const size_t head = kMaxPathWidth / 3, tail = kMaxPathWidth - head - 3;
  return path.substr(0, head) + "..." + path.substr(path.size() - tail);
}

// Sections of "  label         text" rows.
class Table {
 public:
  explicit Table(bool color) : color_(color) {}

  void heading(std::string_view text) {
    out_ += color_ ? fmt::format("\033[1m{}\033[0m\n", text) : fmt::format("{}\n", text);
  }

  // Long texts go on in further lines, broken after a comma. Empty ones leave no row.
  void row(std::string_view label, std::string_view text) {
    while (!text.empty()) {
      size_t length = text.size();
      if (length > kTextWidth) {
        const size_t comma = text.rfind(", ", kTextWidth - 1);
        if (comma != std::string_view::npos) length = comma + 1;
      }
      out_ += fmt::format("  {:<{}}{}\n", label, kLabelWidth, text.substr(0, length));
      text.remove_prefix(std::min(text.size(), length + 1));
      label = "";
    }
  }

  void line(std::string_view text) { out_ += fmt::format("  {}\n", text); }

  std::string take() { return std::move(out_); }

 private:
  std::string out_;
  const bool color_;
};

std::optional<int64_t> training_tokens(const StartupInfo& info) {
  int64_t tokens = 0;
  for (const DataRow& row : info.data) {
    if (row.split != "train") continue;
    if (!row.tokens) return std::nullopt;
    tokens += *row.tokens;
  }
  return tokens;
}

std::string headline(const StartupInfo& info) {
  std::string out = fmt::format("deepseek-train {}", info.version);
  if (!info.commit.empty()) out += fmt::format(" ({})", info.commit);
  out += ": ";
  if (info.parameters_total)
    out +=
        fmt::format("{} parameters, ", format_count(static_cast<double>(*info.parameters_total)));
  out += format_plural(info.ranks, "rank");
  if (!info.layout.empty()) out += fmt::format(" ({})", info.layout);
  if (const auto tokens = training_tokens(info); tokens && *tokens > 0)
    out += fmt::format(", {} training tokens", format_count(static_cast<double>(*tokens)));
  out += info.resume.empty() ? ", from scratch" : fmt::format(", from step {}", info.resume_step);
  out += fmt::format(", to {}\n", info.run_dir);
  return out;
}

void add_run(Table& table, const StartupInfo& info) {
  table.heading("Run");
  table.row("name", info.run_name);
  table.row("starts", info.resume.empty() ? "from scratch" : "from " + info.resume);
  std::string device = info.device;
  if (info.threads > 0) device += ", " + format_plural(info.threads, "thread");
  if (!info.isa.empty()) device += ", " + info.isa;
  if (!info.precision.empty()) device += ", " + info.precision;
  table.row("device", device);
  table.row("layout", info.layout.empty() ? format_plural(info.ranks, "rank")
                                          : format_plural(info.ranks, "rank") + ", " + info.layout);
}

void add_layout(Table& table, const StartupInfo& info) {
  if (info.mesh.empty()) return;
  table.heading("Layout");
  for (const std::string& line : info.mesh) table.line(line);
  if (info.parameters_of_rank)
    table.row("of a rank",
              format_count(static_cast<double>(*info.parameters_of_rank)) + " parameters");
  table.row("parameters", info.parameter_memory);
  table.row("in flight", info.in_flight);
  table.row("expert buffer", info.expert_buffer);
  table.row("compression", info.compression);
}

void add_model(Table& table, const StartupInfo& info) {
  table.heading("Model");
  table.row("architecture", info.model);
  const auto parameters = [](const std::optional<int64_t>& count) -> std::string {
    if (!count) return kNotAvailable;
    return fmt::format("{} ({})", format_count(static_cast<double>(*count)),
                       format_grouped(*count));
  };
  table.row("parameters",
            fmt::format("{} in all, {} active per token", parameters(info.parameters_total),
                        parameters(info.parameters_active)));
  table.row("compute", info.flops_per_token ? format_flops(*info.flops_per_token) +
                                                  " per token, forward and backward"
                                            : std::string(kNotAvailable));
}

// The rows of one memory, the largest ones where there are many, and their sum.
void add_rows(Table& table, std::vector<MemoryRow> rows, const std::string& sum_label,
              const std::optional<int64_t>& available) {
  if (rows.size() > kMaxMemoryRows) {
    std::stable_sort(rows.begin(), rows.end(), [](const MemoryRow& a, const MemoryRow& b) {
      return a.bytes.value_or(0) > b.bytes.value_or(0);
    });
    MemoryRow rest = {fmt::format("{} others", rows.size() - kMaxMemoryRows + 1), 0};
    for (size_t i = kMaxMemoryRows - 1; i < rows.size(); ++i)
      *rest.bytes += rows[i].bytes.value_or(0);
    rows.resize(kMaxMemoryRows - 1);
    rows.push_back(rest);
  }
  size_t width = std::max(kLabelWidth, sum_label.size() + 2);
  for (const MemoryRow& row : rows) width = std::max(width, row.owner.size() + 2);
  const auto add = [&](const std::string& owner, const std::string& text) {
    table.line(fmt::format("{:<{}}{:>10}", owner, width, text));
  };
  int64_t total = 0;
  bool all_known = true;
  for (const MemoryRow& row : rows) {
    add(row.owner, row.bytes ? format_bytes(*row.bytes) : kNotAvailable);
    all_known = all_known && row.bytes.has_value();
    total += row.bytes.value_or(0);
  }
  std::string sum = all_known ? format_bytes(total) : "over " + format_bytes(total);
  if (available) sum = fmt::format("{:>10} of {} available", sum, format_bytes(*available));
  add(sum_label, sum);
}

std::string communicators_text(const CommunicatorMemory& memory) {
  return fmt::format(
      "NCCL's {} for {}, {}", format_bytes(memory.bytes),
      format_plural(memory.count, "communicator"),
      memory.is_measured ? "measured: it is taken already" : "an estimate (one machine, NVLink)");
}

void add_memory(Table& table, const StartupInfo& info) {
  if (info.memory.empty()) return;
  table.heading(info.memory_rank.empty() ? info.ranks > 1 ? "Memory of one rank" : "Memory"
                                         : "Memory of " + info.memory_rank);
  std::vector<MemoryRow> gpu, host;
  for (const MemoryRow& row : info.memory) (row.on_gpu ? gpu : host).push_back(row);
  if (gpu.empty()) return add_rows(table, std::move(host), "total", info.memory_available_bytes);
  add_rows(table, std::move(gpu), "total on the GPU", info.gpu_available_bytes);
  if (info.communicators) table.row("beside it", communicators_text(*info.communicators));
  add_rows(table, std::move(host), "total on the host", info.memory_available_bytes);
}

void add_data(Table& table, const StartupInfo& info) {
  if (info.data.empty()) return;
  table.heading("Data");
  const size_t shown = info.data.size() > kMaxDataRows ? kMaxDataRows - 1 : info.data.size();
  double weights = 0;
  for (const DataRow& row : info.data) weights += row.split == "train" ? row.weight : 0;
  size_t path_width = 0, token_width = 0, document_width = 0;
  for (size_t i = 0; i < shown; ++i) {
    path_width = std::max(path_width, shorten(info.data[i].source).size());
    token_width = std::max(token_width, count_or_not(info.data[i].tokens).size());
    document_width = std::max(document_width, count_or_not(info.data[i].documents).size());
  }
  for (size_t i = 0; i < shown; ++i) {
    const DataRow& row = info.data[i];
    if (!row.tokens && !row.documents) {
      table.line(fmt::format("{:<{}}{:<{}}  {}", row.split, kLabelWidth, shorten(row.source),
                             path_width, kNotAvailable));
      continue;
    }
    std::string text =
        fmt::format("{:<{}}{:<{}}  {:>{}} tokens  {:>{}} document{}", row.split, kLabelWidth,
                    shorten(row.source), path_width, count_or_not(row.tokens), token_width,
                    count_or_not(row.documents), document_width, row.documents == 1 ? "" : "s");
    if (row.split == "train" && row.weight != weights && weights > 0)
      text += fmt::format("  {:.1f}%", 100.0 * row.weight / weights);
    table.line(text);
  }
  if (shown == info.data.size()) return;
  int64_t tokens = 0;
  for (size_t i = shown; i < info.data.size(); ++i) tokens += info.data[i].tokens.value_or(0);
  table.line(fmt::format("{:<{}}{} more sources, {} tokens", "", kLabelWidth,
                         info.data.size() - shown, format_grouped(tokens)));
}

void add_schedule(Table& table, const StartupInfo& info) {
  table.heading("Schedule");
  const double tokens = static_cast<double>(info.steps) * static_cast<double>(info.tokens_per_step);
  std::string steps = fmt::format("{} of {} tokens = {} tokens", format_grouped(info.steps),
                                  format_grouped(info.tokens_per_step), format_count(tokens));
  steps += info.epochs ? fmt::format(", {:.2f} epochs", *info.epochs) : ", epochs not available";
  table.row("steps", steps);
  table.row("optimizer", info.optimizer);
  table.row("learning rate", info.schedule);
  table.row("checkpoints", info.checkpoints);
}

std::string eval_figures(const EvalRecord& eval) {
  std::string out = fmt::format("{} loss {}", eval.set, format_fixed(eval.loss, 4));
  if (eval.bits_per_byte)
    out += fmt::format(", {} bits/byte", format_fixed(*eval.bits_per_byte, 4));
  return out;
}

// "held up computing for 3.1% of a step (2.4 ms): gradients 2.0%, parameters 1.1%"
std::string exposed_text(const ExposedRecord& exposed, double step_ms) {
  const auto share = [&](double ms) {
    return fmt::format("{:.1f}%", step_ms > 0 ? 100.0 * ms / step_ms : 0.0);
  };
  const double total = exposed.total_ms();
  std::string text =
      fmt::format("held up computing for {} of a step ({:.3g} ms)", share(total), total);
  const char* separator = ": ";
  for (size_t kind = 0; kind < kCommKinds; ++kind) {
    if (!exposed.ms[kind]) continue;
    text += fmt::format("{}{} {}", std::exchange(separator, ", "),
                        kind_name(static_cast<CommKind>(kind)), share(*exposed.ms[kind]));
  }
  return text;
}

}  // namespace

std::string startup_table(const StartupInfo& info, bool color) {
  Table table(color);
  add_run(table, info);
  add_layout(table, info);
  add_model(table, info);
  add_memory(table, info);
  add_data(table, info);
  add_schedule(table, info);
  std::string out = headline(info) + table.take();
  if (info.dry_run) out += "Dry run: nothing is trained or written.\n";
  return out;
}

std::string final_line(const RunSummary& summary) {
  std::string out = fmt::format(
      "{} at step {} of {}: {} tokens, loss {}", summary.outcome, summary.step, summary.steps,
      format_count(static_cast<double>(summary.total_tokens)), format_fixed(summary.loss, 4));
  for (const EvalRecord& eval : summary.evals) out += ", " + eval_figures(eval);
  out += fmt::format(", {} tok/s", format_count(summary.tokens_per_s));
  if (!summary.checkpoint.empty()) out += ", checkpoint " + summary.checkpoint;
  return out;
}

std::string final_report(const RunSummary& summary, bool color) {
  Table table(color);
  table.heading(fmt::format("{} at step {} of {}", summary.outcome, format_grouped(summary.step),
                            format_grouped(summary.steps)));
  std::string loss = format_fixed(summary.loss, 4);
  if (summary.skipped_total > 0)
    loss += fmt::format(", {} skipped because the gradient was not finite",
                        format_plural(summary.skipped_total, "step"));
  table.row("loss", loss);
  for (const EvalRecord& eval : summary.evals)
    table.row("evaluation", eval_figures(eval) + fmt::format(" at step {}", eval.step));
  table.row("trained", format_count(static_cast<double>(summary.total_tokens)) + " tokens");
  std::string speed = fmt::format("{} tok/s over {}", format_count(summary.tokens_per_s),
                                  format_duration(summary.seconds));
  if (summary.mfu) speed += fmt::format(", {:.1f}% of the device's peak", 100.0 * *summary.mfu);
  table.row("speed", speed);
  for (std::string_view rest = summary.traffic; !rest.empty();) {  // a row per phase
    const size_t end = std::min(rest.find("; "), rest.size());
    table.row("traffic", rest.substr(0, end));
    rest.remove_prefix(std::min(end + 2, rest.size()));
  }
  if (summary.exposed) table.row("communication", exposed_text(*summary.exposed, summary.step_ms));
  table.row("checkpoint", summary.checkpoint);
  table.row("metrics", summary.metrics);
  table.row("tensorboard", summary.tensorboard);
  if (!summary.next.empty()) {
    table.heading("Next");
    size_t width = kLabelWidth;
    for (const NextCommand& next : summary.next) width = std::max(width, next.why.size() + 2);
    for (const NextCommand& next : summary.next)
      table.line(fmt::format("{:<{}}{}", next.why, width, next.command));
  }
  return table.take();
}

}  // namespace dstrain
