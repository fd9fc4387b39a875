// verify --reference DIR: our numbers beside those of a Hugging Face model.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "apps/reference_check.h"

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

}  // namespace

int cmd_verify(const VerifyOptions& options) {
  if (options.reference.empty()) throw UsageError("verify needs --reference DIR");
  if (options.ranks.value_or(1) > 1)
    throw ConfigError("--ranks: comparing layouts is not available: this build trains on one rank");
  const LoadedConfig loaded = load_config(options.config);
  const std::unique_ptr<Backend> backend = make_backend(loaded.config);
  const ReferenceReport report =
      check_reference(*backend, options.reference, loaded.config.train.recompute);
  options.json ? print_json(report) : print_table(report);
  return report.ok() ? 0 : 1;
}

}  // namespace dstrain
