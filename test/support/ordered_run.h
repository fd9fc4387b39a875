// A job at a layout on ranks that account for the order of their streams.
#pragma once

#include <set>
#include <string>

#include "core/config/config.h"
#include "core/config/layout.h"
#include "test/support/ordered_backend.h"

namespace dstrain::test {

struct OrderedRun {
  std::set<std::string> conflicts;  // of all ranks
  std::set<OrderedBackend::Wait> waits;  // of rank 0
  int64_t calls = 0;                     // of rank 0
};

// What TrainerRank does. left_out: waits that rank 0 does not make. nodes: machines that the ranks
// say they are on.
OrderedRun run_ordered(const Config& config, const MeshShape& shape,
                       const std::set<OrderedBackend::Wait>& left_out = {}, int nodes = 1);

}  // namespace dstrain::test
