// config explain, config schema, config show: the job file, for people and editors.
#include <cstdio>

#include "apps/commands.h"
#include "core/base/log.h"
#include "core/config/validate.h"

namespace dstrain {

int cmd_config_explain(const ConfigOptions& options) {
  std::fputs(explain(load_config(options.config), options.key).c_str(), stdout);
  return 0;
}

int cmd_config_schema(const ConfigOptions&) {
  std::fputs(config_schema().c_str(), stdout);
  return 0;
}

int cmd_config_show(const ConfigOptions& options) {
  const LoadedConfig loaded = load_config(options.config);
  validate(loaded, Purpose::inspect);
  for (const std::string& warning : config_warnings(loaded.config)) log_warning("{}", warning);
  const std::string yaml = options.origins ? loaded.resolved_yaml() : dump_config(loaded.config);
  std::fputs(yaml.c_str(), stdout);
  return 0;
}

}  // namespace dstrain
