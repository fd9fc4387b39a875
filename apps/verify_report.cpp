#include "apps/verify_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/base/format_units.h"
#include "core/metrics/report.h"

namespace dstrain {
namespace {

constexpr const char *kRed = "\033[31m", *kGreen = "\033[32m", *kPlain = "\033[0m";

std::string paint(const std::string& text, const char* color, bool on) {
  return on ? color + text + kPlain : text;
}

struct Column {
  const char* title;
  const char* check;  // how the check's name begins
  double LayoutTolerances::*limit;
};
constexpr Column kColumns[] = {{"gradients", "gradients", &LayoutTolerances::gradient},
                               {"norm", "gradient norm", &LayoutTolerances::gradient},
                               {"losses", "losses", &LayoutTolerances::loss},
                               {"weights", "parameters", &LayoutTolerances::parameter},
                               {"routing", "margin", &LayoutTolerances::margin},
                               {"copies", "copies", nullptr}};
constexpr int kColumnWidth = 10;
constexpr size_t kTextWidth = 84;

size_t name_width(const VerifyPlan& plan) {
  size_t width = 24;
  for (const VerifyLayout& layout : plan.layouts) width = std::max(width, layout.name.size());
  return width;
}

std::string number(double value) {
  return value == 0 ? "0" : std::isfinite(value) ? fmt::format("{:.1e}", value) : "differ";
}

const LayoutCheck* find_check(const VerifyRow& row, const char* start) {
  const auto at = std::find_if(row.checks.begin(), row.checks.end(), [&](const LayoutCheck& check) {
    return check.name.starts_with(start);
  });
  return at == row.checks.end() ? nullptr : &*at;
}

std::string cell(const LayoutCheck* check, bool color) {
  const std::string text = fmt::format("{:>{}}", check ? number(check->worst) : "-", kColumnWidth);
  return check && !check->ok() ? paint(text, kRed, color) : text;
}

// Lines of at most kTextWidth columns, broken after commas where that leaves long ones.
std::string wrap(const char* label, std::string text) {
  std::string out = fmt::format("{:<8}", label);
  while (text.size() > kTextWidth) {
    const size_t comma = text.rfind(", ", kTextWidth);
    const bool is_good = comma != std::string::npos && comma > kTextWidth * 2 / 3;
    const size_t space = is_good ? comma + 1 : text.rfind(' ', kTextWidth);
    if (space == std::string::npos) break;
    out += text.substr(0, space) + "\n        ";
    text.erase(0, space + 1);
  }
  return out + text + "\n";
}

std::string json_line(const nlohmann::ordered_json& object) {
  return object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace

std::string verify_head(const Config& job, const VerifyPlan& plan,
                        const VerifyRunOptions& options) {
  const Config& c = plan.config;
  std::string out = wrap("job", describe_model(job.model));
  out += wrap("tried", describe_model(c.model));
  out += fmt::format("        {} steps of {} with {} tokens, {} a micro-batch\n", options.steps,
                     format_plural(c.train.global_batch, "sequence"), c.data.seq_len,
                     c.train.micro_batch);
  out += fmt::format("against one rank, up to {} ranks as threads of this process\n", plan.ranks);
  if (plan.left_out > 0)
    out += fmt::format("{} of up to {} ranks {} left out; --all tries every one\n",
                       format_plural(plan.left_out, "legal layout"), plan.ranks,
                       plan.left_out == 1 ? "is" : "are");
  for (const std::string& note : plan.notes) out += wrap("note", note);
  std::string titles, limits;
  for (const Column& column : kColumns) {
    titles += fmt::format("{:>{}}", column.title, kColumnWidth);
    limits += column.limit
                  ? fmt::format("{:>{}}", fmt::format("{:.0e}", options.tolerances.*column.limit),
                                kColumnWidth)
                  : fmt::format("{:>{}}", "0", kColumnWidth);
  }
  const size_t width = name_width(plan);
  out += fmt::format("\n{:<{}} {}\n", "layout", width, titles);
  out += fmt::format("{:<{}} {}\n", "  limit", width, limits);
  return out;
}

std::string verify_line(const VerifyPlan& plan, const VerifyRow& row, bool color) {
  std::string out = fmt::format("{:<{}} ", row.layout.name, name_width(plan));
  const LayoutCheck* bits = find_check(row, "bits");
  if (bits) {
    out += fmt::format("{:>{}}", bits->ok() ? "the same bits" : "other bits",
                       kColumnWidth * std::size(kColumns));
  } else {
    for (const Column& column : kColumns) out += cell(find_check(row, column.check), color);
  }
  out += row.ok() ? paint("  ok", kGreen, color) : paint("  FAIL", kRed, color);
  out += "\n";
  if (!row.failure.empty()) out += "    the run failed: " + row.failure + "\n";
  for (const std::string& line : row.diagnosis) out += "    " + line + "\n";
  return out;
}

std::string verify_json(const VerifyRow& row) {
  nlohmann::ordered_json line = {{"layout", row.layout.name},
                                 {"ranks", row.layout.shape.ranks()},
                                 {"zero", row.layout.zero},
                                 {"ok", row.ok()}};
  nlohmann::ordered_json checks = nlohmann::ordered_json::array();
  for (const LayoutCheck& check : row.checks) {
    nlohmann::ordered_json entry = {{"check", check.name},
                                    {"worst", nullptr},
                                    {"limit", check.limit},
                                    {"ok", check.ok()},
                                    {"where", check.where}};
    if (std::isfinite(check.worst)) entry["worst"] = check.worst;
    checks.push_back(std::move(entry));
  }
  line["checks"] = std::move(checks);
  if (!row.failure.empty()) line["failure"] = row.failure;
  if (!row.diagnosis.empty()) line["diagnosis"] = row.diagnosis;
  line["seconds"] = row.seconds;
  return json_line(line);
}

std::string verify_json_end(const VerifyPlan& plan, const VerifyRunOptions& options, bool ok) {
  return json_line({{"ok", ok},
                    {"layouts", plan.layouts.size()},
                    {"left_out", plan.left_out},
                    {"largest_ranks", plan.ranks},
                    {"steps", options.steps},
                    {"notes", plan.notes}});
}

int print_verification(const Config& job, const VerifyPlan& plan, const VerifyRunOptions& options,
                       bool json, bool color, std::FILE* out) {
  const auto print = [out](const std::string& text) {
    std::fputs(text.c_str(), out);
    std::fflush(out);  // a layout takes a second
  };
  if (!json) print(verify_head(job, plan, options));
  const bool ok = run_verification(plan, options, [&](const VerifyRow& row) {
    print(json ? verify_json(row) : verify_line(plan, row, color));
  });
  if (json)
    print(verify_json_end(plan, options, ok));
  else
    print(ok ? "all within the limits\n" : "beyond the limits: see the lines marked FAIL\n");
  return ok ? 0 : 1;
}

}  // namespace dstrain
