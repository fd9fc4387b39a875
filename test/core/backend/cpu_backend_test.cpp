// Memory, copies, quotas and names of the CPU back end.
#include "core/backend/cpu_backend.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "core/backend/cpu_info.h"
#include "core/base/error.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

TEST_CASE("memory of every size is aligned, writable and given back", "[core][backend]") {
  const auto backend = make_cpu_backend(1);
  for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{257}, (int64_t{4} << 20) - 1,
                              int64_t{4} << 20, (int64_t{4} << 20) + 4097, int64_t{64} << 20}) {
    for (const MemoryKind kind : {MemoryKind::device, MemoryKind::host}) {
      const DeviceMemory memory(*backend, bytes, kind);
      REQUIRE(memory.data() != nullptr);
      REQUIRE(reinterpret_cast<uintptr_t>(memory.data()) % 256 == 0);
      auto* const data = static_cast<char*>(memory.data());
      if (bytes > 0) data[0] = data[bytes - 1] = 1;
    }
  }
}

int64_t mapped_pages() {
  std::ifstream file("/proc/self/statm");
  int64_t pages = 0;
  file >> pages;
  return pages;
}

TEST_CASE("large blocks leave nothing mapped behind", "[core][backend]") {
  const auto backend = make_cpu_backend(1);
  const int64_t before = mapped_pages();
  for (int i = 0; i < 20; ++i)
    DeviceMemory(*backend, (int64_t{32} << 20) + 12345, MemoryKind::device);
  CHECK(mapped_pages() <= before + 16);
}

TEST_CASE("running out of memory is an error that names the size", "[core][backend]") {
  const auto backend = make_cpu_backend(1);
  CHECK_THROWS_AS(backend->allocate(int64_t{1} << 60, MemoryKind::device), RuntimeFailure);
  std::string message;
  try {
    backend->allocate(INT64_MAX, MemoryKind::device);
  } catch (const RuntimeFailure& error) {
    message = error.what();
  }
  CHECK(message.find("9223372036854775807 bytes") != std::string::npos);
}

TEST_CASE("copies, streams and events", "[core][backend]") {
  const auto backend = make_cpu_backend(2);
  CHECK(backend->is_cpu());
  const auto stream = backend->make_stream();
  CHECK(stream->native() == nullptr);
  const auto event = backend->make_event();
  const std::vector<int> source = {1, 2, 3};
  std::vector<int> destination(3);
  backend->copy(*stream, destination.data(), source.data(), 12);
  backend->copy(*stream, nullptr, nullptr, 0);
  event->record(*stream);
  event->wait_on(*stream);
  event->synchronize();
  stream->synchronize();
  CHECK(destination == source);
}

TEST_CASE("a back end describes its threads, instruction set and library", "[core][backend]") {
  CHECK(make_cpu_backend(1)->describe() ==
        "1 thread, " + check_instruction_set() + ", " + matmul_library());
  CHECK(make_cpu_backend(3)->describe().substr(0, 11) == "3 threads, ");
  CHECK(missing_instruction_sets().empty());
  CHECK(available_cores() >= 1);
  CHECK(available_cores() <= affinity_cores());
}

class CgroupTree {
 public:
  CgroupTree() {
    char name[] = "/tmp/dstrain_cgroup_XXXXXX";
    root_ = mkdtemp(name);
  }
  ~CgroupTree() { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root_ + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  int64_t cores(const std::string& self) const { return cgroup_quota_cores(self, root_); }

 private:
  std::string root_;
};

TEST_CASE("quota of control groups, version 2", "[core][backend]") {
  const CgroupTree tree;
  CHECK(tree.cores("0::/\n") == 0);
  CHECK(tree.cores("") == 0);
  CHECK(tree.cores("nonsense\n1:x") == 0);
  tree.write("/a/cpu.max", "400000 100000\n");
  tree.write("/a/b/cpu.max", "max 100000\n");
  tree.write("/a/b/c/cpu.max", "550000 100000\n");
  CHECK(tree.cores("0::/a/b\n") == 4);    // a parent's limit counts
  CHECK(tree.cores("0::/a/b/c\n") == 4);  // the tightest one
  CHECK(tree.cores("0::/other\n") == 0);
  tree.write("/cpu.max", "150000 100000\n");
  CHECK(tree.cores("0::/a/b/c\n") == 2);  // rounded up
  tree.write("/cpu.max", "1000 100000\n");
  CHECK(tree.cores("0::/not/mounted/here\n") == 1);
}

TEST_CASE("quota of control groups, version 1", "[core][backend]") {
  const CgroupTree tree;
  const std::string self = "9:memory:/box\n2:cpu,cpuacct:/box\n0::/\n";
  CHECK(tree.cores(self) == 0);
  tree.write("/cpu,cpuacct/box/cpu.cfs_quota_us", "-1\n");
  tree.write("/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n");
  CHECK(tree.cores(self) == 0);
  tree.write("/cpu,cpuacct/box/cpu.cfs_quota_us", "250000\n");
  CHECK(tree.cores(self) == 3);
  CHECK(tree.cores("3:cpuset:/box\n") == 0);
  tree.write("/cpu/cpu.cfs_quota_us", "100000\n");
  tree.write("/cpu/cpu.cfs_period_us", "100000\n");
  CHECK(tree.cores("1:cpu:/\n") == 1);
}

}  // namespace
}  // namespace dstrain
