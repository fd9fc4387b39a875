// What control groups, which containers, Slurm and systemd set, leave this process of memory.
#pragma once

#include <cstdint>
#include <string>

namespace dstrain {

// Bytes until the tightest limit of the process's group and those above it, page cache that the
// kernel can drop left out; the largest int64_t where nothing limits it. Versions 1 and 2.
// `groups`: the text of /proc/self/cgroup. `mount`: where control groups are, /sys/fs/cgroup.
int64_t control_group_available_bytes(const std::string& groups, const std::string& mount);

}  // namespace dstrain
