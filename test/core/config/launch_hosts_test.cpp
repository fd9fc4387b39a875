#include "core/config/launch_hosts.h"

#include "core/config/layout.h"
#include "test/support/catch.h"

namespace dstrain {

TEST_CASE("launch_hosts: names, with their own number of ranks or without", "[config]") {
  const std::optional<LaunchHost> plain = parse_launch_host("node-1.rack_2");
  REQUIRE(plain);
  CHECK(plain->name == "node-1.rack_2");
  CHECK(plain->ranks == 0);
  const std::optional<LaunchHost> counted = parse_launch_host("10.0.0.7:8");
  REQUIRE(counted);
  CHECK(counted->name == "10.0.0.7");
  CHECK(counted->ranks == 8);
}

TEST_CASE("launch_hosts: what mpirun or a shell could read otherwise is no host", "[config]") {
  for (const char* text : {"", ":", ":8", "a:", "a:0", "a:-1", "a:8x", "a:8:8", "a: 8", "a:65537",
                           "a:99999999999999999999", "-oProxyCommand=x", "a;b", "a b", "a,b", "a\n",
                           "$(x)", "a/b", "b\xc3\xa4r"})
    CHECK_FALSE(parse_launch_host(text));
}

TEST_CASE("launch_ranks: all hosts together, unless one is auto", "[config]") {
  LaunchConfig launch;
  CHECK(launch_ranks(launch) == 0);
  launch.hosts = {"a:2", "b:6"};
  CHECK(launch_ranks(launch) == 8);
  launch.hosts = {"a:2", "b"};
  CHECK(launch_ranks(launch) == 0);
  launch.ranks.value = 4;
  CHECK(launch_ranks(launch) == 6);
  launch.hosts = {};
  CHECK(launch_ranks(launch) == 4);
}

}  // namespace dstrain
