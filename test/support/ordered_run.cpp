#include "test/support/ordered_run.h"

#include <fmt/format.h>

#include <mutex>

#include "parallel/thread_communicator.h"
#include "test/support/trainer_rank.h"

namespace dstrain::test {

OrderedRun run_ordered(const Config& config, const MeshShape& shape,
                       const std::set<OrderedBackend::Wait>& left_out, int nodes) {
  OrderedRun run;
  std::mutex mutex;
  run_rank_threads(static_cast<int>(shape.ranks()), [&](Communicator& world) {
    OrderedBackend backend(world.rank() == 0 ? left_out : std::set<OrderedBackend::Wait>());
    OrderedCommunicator ranks(world, backend);
    TrainerRank rank(config, shape, ranks, backend,
                     fmt::format("machine {}", world.rank() * nodes / world.size()));
    rank.run();
    const std::lock_guard lock(mutex);
    for (const std::string& conflict : backend.order().conflicts()) run.conflicts.insert(conflict);
    if (world.rank() != 0) return;
    run.waits = backend.waits();
    run.calls = backend.order().calls();
  });
  return run;
}

}  // namespace dstrain::test
