// verify --reference DIR: our numbers beside those of a Hugging Face model. verify --config FILE:
// the layouts that a job could use beside one rank.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "apps/reference_check.h"
#include "apps/verify_report.h"
#include "core/config/validate.h"

namespace dstrain {
namespace {

void print_table(const ReferenceReport& report) {
  std::printf("%-44s %9s  %10s  %8s  %-4s  %s\n", "comparison", "compared", "largest", "limit", "",
              "where");
  for (const ReferenceRow& row : report.rows)
    std::printf("%-44s %9lld  %10.2e  %8.0e  %-4s  %s\n", row.kind.c_str(),
                static_cast<long long>(row.compared), row.worst, row.limit,
                row.ok() ? "ok" : "FAIL", row.where.c_str());
  std::printf("%s\n", report.ok() ? "all within the limits"
                                  : "beyond the limits: see the lines marked FAIL");
}

void print_json(const ReferenceReport& report) {
  for (const ReferenceRow& row : report.rows)
    std::printf("%s\n", nlohmann::ordered_json{{"comparison", row.kind},
                                               {"compared", row.compared},
                                               {"largest", row.worst},
                                               {"limit", row.limit},
                                               {"ok", row.ok()},
                                               {"where", row.where}}
                            .dump()
                            .c_str());
}

int verify_reference(const VerifyOptions& options) {
  if (options.ranks || options.all)
    throw UsageError("--ranks and --all are for comparing layouts, which --reference does not do");
  const LoadedConfig loaded = load_config(options.config);
  const std::unique_ptr<Backend> backend = make_backend(loaded.config);
  const ReferenceReport report =
      check_reference(*backend, options.reference, loaded.config.train.recompute);
  options.json ? print_json(report) : print_table(report);
  return report.ok() ? 0 : 1;
}

int verify_job(const VerifyOptions& options) {
  const LoadedConfig loaded = load_config(options.config);
  validate(loaded, Purpose::inspect);
  const VerifyPlan plan = plan_verification(loaded.config, options.ranks.value_or(0), options.all);
  if (plan.layouts.empty())
    throw ConfigError(fmt::format(
        "no layout of 2 to {} ranks is legal for this model; there is nothing to compare",
        plan.ranks));
  const bool color =
      decide_color(ColorMode::automatic, 1, std::getenv("NO_COLOR"), std::getenv("TERM"));
  return print_verification(loaded.config, plan, {}, options.json, color, stdout);
}

}  // namespace

int cmd_verify(const VerifyOptions& options) {
  if (!options.reference.empty()) return verify_reference(options);
  if (options.config.path || !options.config.overrides.empty()) return verify_job(options);
  throw UsageError("verify needs --config FILE or --reference DIR");
}

}  // namespace dstrain
