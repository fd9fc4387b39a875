// The comparison of layouts must be able to fail: planted faults, each beside a sound run of the
// same job.
#include "test/support/layout_faults.h"
#include "test/support/catch.h"

namespace dstrain::test {
namespace {

TEST_CASE("layout faults: the comparison finds each of them, and nothing in a sound run",
          "[ranks]") {
  for (const LayoutFault& fault : layout_faults()) {
    INFO(fault.name << ", at " << to_text(fault.job));
    const LayoutReference reference(fault.job.config, 3);
    LayoutRunOptions options = replay_options(reference);
    CHECK(failures(reference, fault.job, options) == "");
    options.fault = fault.fault;
    const std::string found = failures(reference, fault.job, options);
    INFO(found);
    CHECK(found.find(fault.found_by + ":") != std::string::npos);
  }
}

}  // namespace
}  // namespace dstrain::test
