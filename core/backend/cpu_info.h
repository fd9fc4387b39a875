// What the processor and the container give this process.
#pragma once

#include <cstdint>
#include <string>

namespace dstrain {

// Cores that the CPU quota of the process's control groups amounts to, rounded up; 0 if there is no
// limit. `self_cgroup` is the text of /proc/self/cgroup, `mount` where the hierarchies are mounted
// (/sys/fs/cgroup). Knows versions 1 and 2 and honours the tightest limit on the path to the root.
int64_t cgroup_quota_cores(const std::string& self_cgroup, const std::string& mount);

// Cores in the affinity mask of the calling thread; at least 1.
int64_t affinity_cores();

// Names of instruction sets that this binary was compiled for and the processor lacks, such as
// "avx512f, avx2"; empty if it has all.
std::string missing_instruction_sets();

}  // namespace dstrain
