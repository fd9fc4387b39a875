#include "core/backend/memory_limit.h"

#include <limits>

#include "core/base/file.h"
#include "test/support/catch.h"
#include "test/support/temp_folder.h"

namespace dstrain {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

// Control groups as the kernel shows them, in a folder.
class Groups {
 public:
  void add_v2(const std::string& group, const std::string& limit, int64_t used, int64_t cache) {
    add(group, "memory.max", limit);
    add(group, "memory.current", std::to_string(used));
    add(group, "memory.stat", "anon 5\ninactive_file " + std::to_string(cache) + "\nslab 7");
  }
  void add_v1(const std::string& group, const std::string& limit, int64_t used, int64_t cache) {
    add("memory" + group, "memory.limit_in_bytes", limit);
    add("memory" + group, "memory.usage_in_bytes", std::to_string(used));
    add("memory" + group, "memory.stat",
        "inactive_file 1\ntotal_inactive_file " + std::to_string(cache));
  }
  int64_t available(const std::string& groups) const {
    return control_group_available_bytes(groups, folder_.path());
  }

 private:
  void add(const std::string& group, const std::string& name, const std::string& text) {
    create_folders(folder_ / group);
    write_file_atomic(join_path(folder_ / group, name), text + "\n");
  }
  test::TempFolder folder_;
};

}  // namespace

TEST_CASE("memory limit: of a container, whose group is the mounted root", "[memory]") {
  Groups groups;
  CHECK(groups.available("0::/\n") == kNone);
  groups.add_v2("", "max", 300, 100);
  CHECK(groups.available("0::/\n") == kNone);
  groups.add_v2("", "1000", 300, 100);
  CHECK(groups.available("0::/\n") == 800);  // the kernel can drop page cache
  CHECK(groups.available("0::/../../host/path\n") == 800);
  CHECK(groups.available("") == kNone);
  CHECK(groups.available("no line of this file\n:\n") == kNone);
  groups.add_v2("", "1000", 1200, 100);
  CHECK(groups.available("0::/\n") == 0);
}

TEST_CASE("memory limit: of a job of Slurm, the tightest of the groups on the way up", "[memory]") {
  const std::string step = "/system.slice/slurmstepd.scope/job_7/step_0";
  Groups groups;
  groups.add_v2("/system.slice/slurmstepd.scope/job_7", "4000", 1000, 0);
  groups.add_v2(step, "9000", 500, 0);
  CHECK(groups.available("0::" + step + "\n") == 3000);
  groups.add_v2(step, "1500", 500, 50);
  CHECK(groups.available("0::" + step + "\n") == 1050);
  CHECK(groups.available("0::/system.slice\n") == kNone);
}

TEST_CASE("memory limit: version 1, where a number above all memory is no limit", "[memory]") {
  Groups groups;
  groups.add_v1("", "9223372036854771712", 5000, 0);
  groups.add_v1("/docker/x", "2000", 700, 200);
  const std::string lines = "12:cpu,cpuacct:/docker/x\n4:hugetlb,memory:/docker/x\n0::/\n";
  CHECK(groups.available(lines) == 1500);
  CHECK(groups.available("4:memory:/elsewhere\n") > int64_t{1} << 60);
}

}  // namespace dstrain
