// What streams that run as late as they may let a test see.
#include "test/support/cuda_on_cpu/streams.h"

#include <cuda_runtime.h>

#include <memory>
#include <vector>

#include "test/support/catch.h"
#include "test/support/cuda_device.h"

namespace dstrain::test {
namespace {

class OrderOf {
 public:
  explicit OrderOf(cuda_on_cpu::Order order) { cuda_on_cpu::set_order(order); }
  ~OrderOf() { cuda_on_cpu::set_order(cuda_on_cpu::Order::late); }
};

// A number goes from stream to stream: what the last one finds.
struct Relay {
  const std::unique_ptr<Stream> first = gpu_backend().make_copy_stream(),
                                second = gpu_backend().make_copy_stream();
  const std::unique_ptr<Event> event = gpu_backend().make_event();
  int source = 1, between = 2, last = 3;

  int run(bool wait, bool first_is_waited_for) {
    gpu_backend().copy(*first, &between, &source, sizeof source);
    event->record(*first);
    if (wait) event->wait_on(*second);
    gpu_backend().copy(*second, &last, &between, sizeof source);
    CHECK(last == 3);  // nobody has waited
    if (first_is_waited_for) first->synchronize();
    second->synchronize();
    return last;
  }
};

}  // namespace

TEST_CASE("cuda on cpu: work that a stream does not wait for comes too late", "[cuda_on_cpu]") {
  CHECK(Relay().run(/*wait=*/true, /*first_is_waited_for=*/false) == 1);
  CHECK(Relay().run(false, false) == 2);
}

// Where the host waits in the right order all the same, the other order shows the fault.
TEST_CASE("cuda on cpu: work that a stream does not wait for comes before it, too",
          "[cuda_on_cpu]") {
  CHECK(Relay().run(false, true) == 1);
  for (const auto order : {cuda_on_cpu::Order::oldest_first, cuda_on_cpu::Order::youngest_first}) {
    const OrderOf in_order(order);
    CHECK(Relay().run(false, true) == 2);
    CHECK(Relay().run(true, true) == 1);
  }
}

TEST_CASE("cuda on cpu: a wait is for what came before the event's last record", "[cuda_on_cpu]") {
  Relay relay;
  relay.event->record(*relay.first);
  relay.event->wait_on(*relay.second);
  CHECK(relay.run(false, false) == 2);
}

TEST_CASE("cuda on cpu: waits can be left out one by one", "[cuda_on_cpu]") {
  cuda_on_cpu::leave_out_waits({1});
  CHECK(Relay().run(true, false) == 1);
  CHECK(Relay().run(true, false) == 2);
  CHECK(cuda_on_cpu::waits_made() == 2);
  cuda_on_cpu::leave_out_waits({});
}

TEST_CASE("cuda on cpu: memory that is given back holds for what is queued", "[cuda_on_cpu]") {
  Relay relay;
  auto memory = std::make_unique<DeviceMemory>(gpu_backend(), 4, MemoryKind::device);
  gpu_backend().copy(*relay.first, memory->data(), &relay.source, 4);
  gpu_backend().copy(*relay.first, &relay.last, memory->data(), 4);
  memory.reset();
  CHECK(relay.last == 3);
  relay.first->synchronize();
  CHECK(relay.last == 1);
}

}  // namespace dstrain::test
