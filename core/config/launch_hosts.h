// The entries of launch.hosts.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace dstrain {

struct LaunchHost {
  std::string name;
  int64_t ranks = 0;  // 0: as many as launch.ranks says
};

// "node1" or "node1:8". None unless the name is letters, digits, '.', '_' and '-', not beginning
// with '-', and the number is from 1 to 65536: such a name cannot be mistaken for an option.
std::optional<LaunchHost> parse_launch_host(std::string_view text);

}  // namespace dstrain
