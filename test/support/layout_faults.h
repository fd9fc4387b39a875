// Faults of distributed training that comparisons of layouts must find: sums that are missing or
// made twice, rows that are lost, ranks that see something else. CPU back end.
#pragma once

#include <string>
#include <vector>

#include "test/support/layout_jobs.h"

namespace dstrain::test {

struct LayoutFault {
  std::string name;
  LayoutJob job;         // where it shows
  std::string found_by;  // a check of compare_layouts() that must fail
  PlantedFault fault;
};
std::vector<LayoutFault> layout_faults();

}  // namespace dstrain::test
