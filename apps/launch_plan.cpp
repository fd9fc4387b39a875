#include "apps/launch_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "apps/launch_variables.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/format_units.h"
#include "core/config/launch_hosts.h"
#include "core/config/layout.h"

namespace dstrain {
namespace {

int64_t auto_ranks_per_host(const Config& config, int64_t gpus) {
  const int64_t layout = smallest_mesh(config).ranks();
  const int64_t hosts = std::max<int64_t>(1, std::ssize(config.launch.hosts));
  if (config.parallel.data.is_auto()) {
    const int64_t devices = config.run.device == Device::cpu ? 0 : gpus;
    return std::max(devices, (layout + hosts - 1) / hosts);
  }
  if (layout % hosts != 0)
    throw ConfigError(fmt::format(
        "the layout under parallel takes {}, which do not divide over the {} of launch.hosts; "
        "write the ranks of each host as in node1:8",
        format_plural(layout, "rank"), format_plural(hosts, "host")));
  return layout / hosts;
}

// Where the other hosts look for Open MPI. They search PATH without it, which finds nothing outside
// the usual places: a remote shell that runs one command reads no login files.
std::string prefix_of(const std::string& mpirun) {
  const std::string bin = parent_folder(mpirun);
  if (bin == "/usr/bin" || bin == "/usr/local/bin" || bin == "/bin") return "";
  return file_name(bin) == "bin" ? parent_folder(bin) : "";
}

bool has_domain(const std::string& host) {
  return host.find('.') != host.npos && host.find_first_not_of("0123456789.") != host.npos;
}

// Open MPI starts ranks without a remote shell where a host has the machine's own name.
const std::string& name_for_mpirun(const std::string& host, const Machine& machine) {
  return host.substr(0, host.find('.')) == machine.name ? machine.name : host;
}

void add_hosts(const LaunchPlan& plan, std::vector<std::string>& words) {
  std::string list;
  bool have_domains = false;
  for (const HostRanks& host : plan.hosts) {
    list += fmt::format("{}{}:{}", list.empty() ? "" : ",",
                        name_for_mpirun(host.host, plan.machine), host.ranks);
    have_domains = have_domains || has_domain(host.host);
  }
  words.insert(words.end(), {"--host", list});
  // Open MPI 4 drops what follows the first dot, and then finds no host or another one.
  if (have_domains && plan.mpirun.major <= 4)
    words.insert(words.end(), {"--mca", "orte_keep_fqdn_hostnames", "1"});
  if (const std::string prefix = prefix_of(plan.mpirun.path); !prefix.empty())
    words.insert(words.end(), {"--prefix", prefix});
}

// Parameters of one machine, for Open MPI 4, whose names they are.
void add_local_parameters(const LaunchPlan& plan, std::vector<std::string>& words) {
  // Both would stay behind if mpirun were killed; this folder is removed in any case.
  words.insert(words.end(), {"--mca", "orte_tmpdir_base", plan.session_folder});
  words.insert(words.end(), {"--mca", "btl_vader_backing_directory", plan.session_folder});
  // Where the kernel refuses it, Open MPI notices in the first large message and ends.
  if (!plan.machine.can_read_processes)
    words.insert(words.end(), {"--mca", "btl_vader_single_copy_mechanism", "none"});
}

void check_root(const Machine& machine, MpirunCommand& command) {
  if (!machine.is_root || machine.allows_root) return;
  if (!machine.is_container)
    throw PermissionError(
        "Open MPI starts no ranks as root, where a mistake can harm the whole system; start this "
        "as "
        "another user, or set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 in the "
        "environment");
  command.variables = {{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}};
  command.notes.push_back(
      "this is root in a container: OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
      "are set for mpirun, which would refuse otherwise");
}

}  // namespace

std::vector<HostRanks> ranks_to_start(const Config& config, int64_t gpus) {
  const AutoInt& wanted = config.launch.ranks;
  const bool is_listed = !config.launch.hosts.empty();
  std::vector<HostRanks> hosts;
  for (const std::string& text : config.launch.hosts) {
    const std::optional<LaunchHost> host = parse_launch_host(text);
    DSTRAIN_CHECK(host, "launch.hosts holds '" + text + "', which validate() lets nobody write");
    hosts.push_back({host->name, host->ranks > 0 ? host->ranks : wanted.value});
  }
  if (!is_listed) hosts.push_back({"", wanted.value});
  for (HostRanks& host : hosts)
    if (host.ranks == 0) host.ranks = auto_ranks_per_host(config, gpus);
  return hosts;
}

int64_t total_ranks(const std::vector<HostRanks>& hosts) {
  int64_t total = 0;
  for (const HostRanks& host : hosts) total += host.ranks;
  return total;
}

int64_t most_ranks_of_host(const std::vector<HostRanks>& hosts) {
  int64_t most = 1;
  for (const HostRanks& host : hosts) most = std::max(most, host.ranks);
  return most;
}

LaunchMode launch_mode(const std::optional<RankEnvironment>& ranks,
                       const std::vector<HostRanks>& hosts) {
  if (ranks) return LaunchMode::rank;
  const bool is_here = hosts.size() == 1 && hosts.front().host.empty();
  return is_here && hosts.front().ranks == 1 ? LaunchMode::single : LaunchMode::launcher;
}

MpirunCommand mpirun_command(const LaunchPlan& plan, const std::vector<std::string>& rank_words) {
  MpirunCommand command;
  check_root(plan.machine, command);
  const int64_t ranks = total_ranks(plan.hosts);
  const bool is_local = plan.hosts.front().host.empty();
  const bool is_known = plan.mpirun.major <= 4;

  std::vector<std::string>& words = command.words;
  command.path = plan.mpirun.path;
  words = {plan.mpirun.name, "-np", fmt::to_string(ranks)};
  if (!is_local) add_hosts(plan, words);
  // The default binds each of two ranks to one core, on which all its threads would share.
  words.insert(words.end(), {"--bind-to", "none"});
  if (is_local) {
    // mpirun counts physical cores and would refuse a rank for each hardware thread.
    if (is_known)
      words.push_back("--oversubscribe");
    else
      words.insert(words.end(), {"--map-by", ":OVERSUBSCRIBE"});
    if (ranks > plan.machine.cores)
      command.notes.push_back(fmt::format("{} share {}: each will be slower than one rank alone",
                                          format_plural(ranks, "rank"),
                                          format_plural(plan.machine.cores, "core")));
  }
  if (is_known) {
    // One message for each rank that fails, so that the launcher can tell the first.
    words.insert(words.end(), {"--mca", "orte_base_help_aggregate", "0"});
    if (is_local) add_local_parameters(plan, words);
  }
  const auto pass = [&](const char* name, const std::string& value) {
    words.insert(words.end(), {"-x", fmt::format("{}={}", name, value)});
  };
  pass(kBoardVariable, board_path(plan.session_folder));
  if (plan.columns) pass(kColumnsVariable, fmt::to_string(*plan.columns));
  words.push_back(plan.program);
  words.insert(words.end(), rank_words.begin(), rank_words.end());
  return command;
}

std::string board_path(const std::string& session_folder) {
  return join_path(session_folder, "ranks");
}

std::string shell_text(const std::vector<std::string>& words) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./:,@%";
  std::string text;
  for (const std::string& word : words) {
    if (!text.empty()) text += ' ';
    if (!word.empty() && word.find_first_not_of(kPlain) == word.npos) {
      text += word;
      continue;
    }
    text += '\'';
    for (const char c : word) {
      if (c == '\'')
        text += "'\\''";
      else
        text += c;
    }
    text += '\'';
  }
  return text;
}

}  // namespace dstrain
