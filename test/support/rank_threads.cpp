#include "test/support/rank_threads.h"

#include "core/backend/cpu_backend.h"
#include "parallel/thread_communicator.h"

namespace dstrain::test {

void run_rank(Communicator& world, const RankBody& body) {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  RankContext context{world, *backend, *stream};
  body(context);
}

void run_ranks(int ranks, const RankBody& body, std::chrono::milliseconds timeout) {
  run_rank_threads(ranks, [&](Communicator& world) { run_rank(world, body); },
                   {.timeout = timeout});
}

void rank_check(bool ok, const std::string& what) {
  if (!ok) throw RuntimeFailure("not as expected: " + what);
}

}  // namespace dstrain::test
