// What the command line says about the configuration, put into one.
#include <fmt/format.h>

#include "apps/commands.h"
#include "core/base/error.h"
#include "core/base/format_units.h"
#include "core/config/validate.h"

namespace dstrain {
namespace {

// Makes `count` micro-batches out of each rank's share of the global batch.
void apply_gradient_accumulation(LoadedConfig& loaded, int64_t count) {
  const std::string typed = fmt::format("--gradient_accumulation {}", count);
  const Origin& set_by = loaded.origin("train.micro_batch");
  if (set_by.kind == Origin::Kind::command_line)
    throw UsageError(
        fmt::format("{} and '{}' both set train.micro_batch; give one", typed, set_by.text));
  Config& config = loaded.config;
  const int64_t ranks = data_parallel_ranks(config);
  if (config.train.global_batch % ranks != 0 || config.train.global_batch / ranks % count != 0)
    throw ConfigError(
        fmt::format("{}: train.global_batch ({}) is not a multiple of {} micro-batch{} x {}", typed,
                    config.train.global_batch, count, count == 1 ? "" : "es",
                    format_plural(ranks, "data-parallel rank")));
  config.train.micro_batch = config.train.global_batch / ranks / count;
  const Location location{loaded.sources.add_argument(typed), 0, 0, 1};
  loaded.set_origin("train.micro_batch", {Origin::Kind::command_line, typed, location});
}

}  // namespace

LoadedConfig load_config(const ConfigSource& source) {
  LoadedConfig loaded = load_config(source.path, source.overrides);
  if (source.gradient_accumulation)
    apply_gradient_accumulation(loaded, *source.gradient_accumulation);
  return loaded;
}

}  // namespace dstrain
