// Ranks on GPUs: every call against the serial result, and what must not lock up. Sums are compared
// bit for bit among two ranks, where there is one order. Skipped where ranks cannot have a GPU
// each.
#include "parallel/nccl_communicator.h"

#include <fmt/format.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/backend/ops.h"
#include "core/base/error.h"
#include "parallel/pipeline_schedule.h"
#include "test/support/catch.h"
#include "test/support/communicator_check.h"
#include "test/support/copied_communicator.h"
#include "test/support/cuda_device.h"
#include "test/support/mpi_ranks.h"

namespace dstrain::test {
namespace {

struct GpuRank {
  Communicator& host;
  Communicator& device;
  Backend& backend;
  Stream& stream;
};

std::string why_skipped(int ranks) {
  if (const std::string missing = why_gpus_missing(ranks); !missing.empty())
    return "no GPU for each rank: " + missing;
  const std::string missing = why_no_nccl();
  return missing.empty() ? "" : "no NCCL: " + missing;
}

void run_gpu_rank(const std::function<void(GpuRank&)>& body, const NcclOptions& options = {}) {
  run_mpi_rank(
      [&](RankContext& context) {
        const std::string skipped = why_skipped(context.world.size());
        if (!skipped.empty() && context.world.rank() == 0) print_skipped(skipped);
        if (!skipped.empty()) return;
        const std::unique_ptr<Backend> backend = make_rank_backend(context.world.rank());
        const std::unique_ptr<Stream> stream = backend->make_stream();
        const auto device = make_nccl_communicator(context.world, *backend, options);
        GpuRank rank{context.world, *device, *backend, *stream};
        body(rank);
      },
      {.timeout = std::chrono::seconds(60)});
}

// Runs checks of ranks on host memory.
void run_checks(const std::vector<void (*)(RankContext&)>& checks) {
  run_gpu_rank([&](GpuRank& rank) {
    CopiedCommunicator uploaded(rank.device, rank.backend, MemoryKind::device);
    RankContext context{uploaded, rank.backend, rank.stream};
    for (const auto check : checks) check(context);
  });
}

// Elements of device memory, all equal.
class Constant {
 public:
  Constant(GpuRank& rank, int64_t n, float value)
      : memory_(rank.backend, n * 4, MemoryKind::device), x(memory_.data(), DType::f32, {n}) {
    rank.backend.ops().fill(rank.stream, x, value);
  }
  void check(GpuRank& rank, float wanted, const char* what) const {
    std::vector<float> host(static_cast<size_t>(x.numel()));
    rank.backend.copy(rank.stream, host.data(), x.raw(), x.bytes());
    rank.stream.synchronize();
    for (const float value : host) rank_check(value == wanted, fmt::format("{}: {}", what, value));
  }

 private:
  DeviceMemory memory_;

 public:
  const Tensor x;
};

}  // namespace

TEST_CASE("nccl communicator: every call gives the serial result, bit for bit",
          "[ranks1][ranks2]") {
  run_checks({check_reductions, check_exchanges, check_messages, check_splits, check_bytes_sent});
}

TEST_CASE("nccl communicator: exchanges, messages and sets of four ranks", "[ranks4]") {
  run_checks({check_exchanges, check_messages, check_splits, check_bytes_sent});
}

TEST_CASE("nccl communicator: tensors in host memory pass before the call returns",
          "[ranks1][ranks2]") {
  run_gpu_rank([](GpuRank& rank) {
    RankContext context{rank.device, rank.backend, rank.stream};
    check_reductions(context);
    check_maxima_keep_nan(context);
    check_exchanges(context);
    check_messages(context);
  });
}

TEST_CASE("nccl communicator: exchanges between ranks that have connected for them, twice",
          "[ranks1][ranks2][ranks4]") {
  run_gpu_rank([](GpuRank& rank) {
    for (int i = 0; i < 2; ++i) rank.device.prepare(Connections::exchanges);
    CopiedCommunicator uploaded(rank.device, rank.backend, MemoryKind::device);
    RankContext context{uploaded, rank.backend, rank.stream};
    check_exchanges(context);
  });
}

TEST_CASE("nccl communicator: what connections take of a GPU is measured", "[ranks2]") {
  NcclOptions options;
  options.free_memory = gpu_memory_free;
  run_gpu_rank(
      [](GpuRank& rank) {
        if (share_gpus() && rank.device.rank() == 0)
          print_skipped("over sockets NCCL takes the host's memory");
        if (share_gpus()) return;
        const NcclMemory one = nccl_memory(rank.device);
        rank_check(one.communicators == 1 && one.bytes > 0, "a communicator and its ring");
        rank.device.prepare(Connections::exchanges);
        const NcclMemory exchanging = nccl_memory(rank.device);
        rank_check(exchanging.communicators == 1 && exchanging.bytes > one.bytes, "exchanges");
        rank.device.prepare(Connections::messages);
        const NcclMemory all = nccl_memory(rank.device);
        constexpr int kMessages = 2 * messages_under_way(2);  // each way
        rank_check(all.communicators == 1 + kMessages && all.bytes > exchanging.bytes, "messages");
        rank_check(nccl_memory(rank.host).communicators == 0, "host memory has none");
        if (rank.device.rank() == 0)
          fmt::print("NCCL takes {} MiB for a ring, {} for exchanges, {} for messages\n",
                     one.bytes >> 20, (exchanging.bytes - one.bytes) >> 20,
                     (all.bytes - exchanging.bytes) >> 20);
      },
      options);
}

// Far more than NCCL keeps on the way.
TEST_CASE("nccl communicator: ranks that all send before they receive do not lock up",
          "[ranks2][ranks4]") {
  run_gpu_rank([](GpuRank& rank) {
    rank.device.prepare(Connections::messages);
    const int size = rank.device.size(), me = rank.device.rank();
    const int next = (me + 1) % size, previous = (me + size - 1) % size;
    constexpr int64_t kElements = int64_t{24} << 20;
    const Constant up(rank, kElements, static_cast<float>(me));
    const Constant down(rank, kElements, static_cast<float>(me + 100));
    const Constant from_below(rank, kElements, -1), from_above(rank, kElements, -1);
    for (int round = 0; round < 3; ++round) {
      rank.device.send(rank.stream, up.x, next);
      rank.device.send(rank.stream, down.x, previous);
      rank.device.recv(rank.stream, from_above.x, next);
      rank.device.recv(rank.stream, from_below.x, previous);
      // Among two, both messages come from the one neighbour, in the order sent.
      from_below.check(rank, static_cast<float>(size == 2 ? previous + 100 : previous), "up");
      from_above.check(rank, static_cast<float>(size == 2 ? next : next + 100), "down");
      rank.device.wait_send(rank.stream, up.x);
      rank.device.wait_sends(rank.stream);
    }
    rank.stream.synchronize();
  });
}

// The order of streams on a GPU is not that of calls: one that waits long must not stop the other.
TEST_CASE("nccl communicator: collectives of two sets on two streams", "[ranks2][ranks4]") {
  run_gpu_rank([](GpuRank& rank) {
    const auto other = rank.device.split(0, -rank.device.rank());
    const auto second = rank.backend.make_stream();
    const auto filled = rank.backend.make_event();
    constexpr int64_t kElements = int64_t{8} << 20;
    const Constant x(rank, kElements, 1), y(rank, kElements, 1);
    filled->record(rank.stream);
    filled->wait_on(*second);
    for (int repeat = 0; repeat < 10; ++repeat) {
      rank.device.all_reduce_sum(rank.stream, x.x);
      other->all_reduce_sum(*second, y.x);
      other->all_reduce_sum(*second, y.x);
    }
    second->synchronize();
    float wanted_x = 1, wanted_y = 1;
    for (int repeat = 0; repeat < 10; ++repeat) {
      wanted_x *= static_cast<float>(rank.device.size());
      wanted_y *= static_cast<float>(rank.device.size() * rank.device.size());
    }
    x.check(rank, wanted_x, "sums on one stream");
    y.check(rank, wanted_y, "sums on the other");
  });
}

TEST_CASE("nccl communicator: without GPUs it says what is missing", "[ranks1]") {
  if (has_nccl() && why_no_nccl().empty()) {
    CHECK(nccl_version().find('.') != std::string::npos);
  } else {
    CHECK_FALSE(why_no_nccl().empty());
    CHECK_THROWS_AS(nccl_version(), RuntimeFailure);
  }
}

}  // namespace dstrain::test
