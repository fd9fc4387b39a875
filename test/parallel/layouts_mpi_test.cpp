// Layouts on MPI processes against one rank, which every process computes for itself. Any two axes
// meet in one of the layouts, and each ZeRO stage and schedule occurs.
#include "test/support/catch.h"
#include "test/support/layout_jobs.h"
#include "test/support/mpi_ranks.h"

namespace dstrain::test {
namespace {

using enum PipelineOrder;

LayoutJob moe(const MeshShape& shape, int64_t zero, PipelineOrder schedule = one_f_one_b) {
  return job_at(tiny_moe_job(layers_for(shape, schedule)), shape, zero, schedule);
}
LayoutJob dense(const MeshShape& shape, int64_t zero, PipelineOrder schedule = one_f_one_b) {
  return job_at(tiny_dense_job(layers_for(shape, schedule)), shape, zero, schedule);
}

void check_on_processes(const std::vector<LayoutJob>& jobs) {
  run_mpi_rank([&](RankContext& rank) {
    for (const LayoutJob& job : jobs) {
      INFO(to_text(job));
      REQUIRE(check_layout(job.config, job.shape).empty());
      const LayoutReference reference(job.config, 5);
      const LayoutRunOptions options = replay_options(reference);
      const LayoutRun run = run_layout_on(rank.world, job.config, job.shape, options);
      CHECK(failures(compare_layouts(job.config, reference.run, run)) == "");
      // What carries the messages changes no bit.
      CHECK(bit_difference(run, run_layout(job.config, job.shape, options)) == "");
    }
  });
}

TEST_CASE("layouts: 2 processes", "[ranks2]") {
  check_on_processes({moe({.data = 2, .expert = 2}, 1), moe({.context = 2}, 2),
                      moe({.tensor = 2, .expert = 2}, 3), moe({.pipeline = 2}, 1, zero_bubble),
                      dense({.pipeline = 2}, 3, interleaved), dense({.data = 2}, 0)});
}

TEST_CASE("layouts: 4 processes", "[ranks4]") {
  check_on_processes({
      moe({.data = 2, .context = 2, .expert = 4}, 1),
      moe({.data = 2, .tensor = 2, .expert = 2}, 3),
      moe({.context = 2, .tensor = 2, .expert = 4}, 2),
      moe({.data = 4, .expert = 4}, 2),
      moe({.tensor = 4, .expert = 2}, 0),
      moe({.context = 4, .expert = 2}, 3),
  });
}

TEST_CASE("layouts: 4 processes with a pipeline", "[ranks4]") {
  check_on_processes({
      moe({.pipeline = 2, .data = 2, .expert = 2}, 1, interleaved),
      moe({.pipeline = 2, .context = 2, .expert = 2}, 0, zero_bubble),
      moe({.pipeline = 2, .tensor = 2}, 3),
      moe({.pipeline = 4}, 2, interleaved),
      dense({.pipeline = 2, .tensor = 2}, 1, zero_bubble),
      dense({.pipeline = 2, .data = 2}, 2),
  });
}

}  // namespace
}  // namespace dstrain::test
