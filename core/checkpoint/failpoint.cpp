#include "core/checkpoint/failpoint.h"

#include "core/base/error.h"

#ifdef DSTRAIN_FAILPOINTS

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <map>
#include <mutex>
#include <thread>

namespace dstrain {
namespace {

enum class Action { kill, exit, fail, sleep };

struct Armed {
  Action action = Action::kill;
  int64_t nth = 0;  // 0: at every pass
  int64_t sleep_ms = 0;
  int64_t passes = 0;
};

// The one piece of global state: a failpoint is reached from code that knows nothing of tests.
struct Registry {
  std::mutex mutex;
  std::map<std::string, Armed, std::less<>> armed;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

int64_t parse_count(std::string_view digits, const std::string& spec) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || end != digits.data() + digits.size() || value < 1)
    throw UsageError(fmt::format("failpoint '{}': '{}' is no positive number", spec, digits));
  return value;
}

std::pair<std::string, Armed> parse_one(const std::string& spec) {
  const size_t equals = spec.find('=');
  if (equals == std::string::npos)
    throw UsageError(
        fmt::format("failpoint '{}': expected name@nth=kill|exit|throw|sleep:MS", spec));
  std::string name = spec.substr(0, equals);
  const std::string action = spec.substr(equals + 1);
  Armed armed;
  if (const size_t at = name.find('@'); at != std::string::npos) {
    armed.nth = parse_count(std::string_view(name).substr(at + 1), spec);
    name.resize(at);
  }
  if (std::find(std::begin(kFailpointNames), std::end(kFailpointNames), name) ==
      std::end(kFailpointNames))
    throw UsageError(fmt::format("failpoint '{}': there is no '{}'; the names are {}", spec, name,
                                 fmt::join(kFailpointNames, ", ")));
  if (action == "kill")
    armed.action = Action::kill;
  else if (action == "exit")
    armed.action = Action::exit;
  else if (action == "throw")
    armed.action = Action::fail;
  else if (action.starts_with("sleep:"))
    armed.action = Action::sleep,
    armed.sleep_ms = parse_count(std::string_view(action).substr(6), spec);
  else
    throw UsageError(fmt::format(
        "failpoint '{}': the action '{}' is not kill, exit, throw or sleep:MS", spec, action));
  return {name, armed};
}

}  // namespace

void configure_failpoints(const std::string& spec) {
  std::map<std::string, Armed, std::less<>> armed;
  for (size_t begin = 0; begin < spec.size();) {
    const size_t comma = std::min(spec.find(',', begin), spec.size());
    armed.insert(parse_one(spec.substr(begin, comma - begin)));
    begin = comma + 1;
  }
  const std::lock_guard lock(registry().mutex);
  registry().armed = std::move(armed);
}

void failpoint_reached(std::string_view name) {
  Armed due;
  {
    const std::lock_guard lock(registry().mutex);
    const auto it = registry().armed.find(name);
    if (it == registry().armed.end()) return;
    const int64_t pass = ++it->second.passes;
    if (it->second.nth != 0 && it->second.nth != pass) return;
    due = it->second;
  }
  switch (due.action) {
    case Action::kill:
      ::kill(::getpid(), SIGKILL);
      return;
    case Action::exit:
      ::_exit(static_cast<int>(ExitCode::failure));
    case Action::fail:
      throw StorageError(fmt::format("failpoint '{}' failed as configured", name));
    case Action::sleep:
      std::this_thread::sleep_for(std::chrono::milliseconds(due.sleep_ms));
      return;
  }
}

}  // namespace dstrain

#else

namespace dstrain {

void configure_failpoints(const std::string& spec) {
  if (!spec.empty())
    throw UsageError("failpoint '" + spec +
                     "': this program was built without failpoints; "
                     "configure with -DDSTRAIN_FAILPOINTS=ON");
}

}  // namespace dstrain

#endif
