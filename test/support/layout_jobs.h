// Tiny jobs for tests of layouts: a mixture of experts with latent attention, a dense model with
// grouped queries and a tied head, both with 67 words and 8 of everything that ranks share; the
// layouts that are legal for them; and one rank's run to compare with.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/config/layout.h"
#include "parallel/layout_run.h"

namespace dstrain::test {

// 8 sequences of 32 tokens a step, one per micro-batch. The learning rate is high and weights are
// large, so that 5 steps change the losses.
Config tiny_moe_job(int64_t layers);
Config tiny_dense_job(int64_t layers);

struct LayoutJob {
  Config config;
  MeshShape shape;
};
// "tensor 4, expert 2, zero 2, interleaved"
std::string to_text(const LayoutJob& job);
// The job at a layout; an interleaved pipeline has two chunks of the model per stage.
LayoutJob job_at(Config config, const MeshShape& shape, int64_t zero,
                 PipelineOrder schedule = PipelineOrder::one_f_one_b);

enum class TinyModel { moe, dense };
// As many layers as the pipeline needs: 4, 8 or 16.
int64_t layers_for(const MeshShape& shape, PipelineOrder schedule);
// Every legal layout of so many ranks, in every schedule that it can have.
std::vector<LayoutJob> all_layouts(TinyModel model, int ranks, int64_t zero);
// The same once each, in turn with the ZeRO stages that it can have.
std::vector<LayoutJob> layouts_in_turn(TinyModel model, int ranks);

// One rank's run of a job, with its routing.
struct LayoutReference {
  // make_backend: as in LayoutRunOptions.
  LayoutReference(const Config& job, int64_t steps,
                  const std::function<void(TrainEngine&)>& at_start = {},
                  const std::function<std::unique_ptr<Backend>(int rank)>& make_backend = {});
  Config config;
  std::shared_ptr<RoutingRecord> record;
  LayoutRun run;
};

// What runs at other layouts are given: steps, the recorded routing, a short time-out.
LayoutRunOptions replay_options(const LayoutReference& reference);
// The checks that fail, a line each; "" if none does. A run that throws fails with its text.
std::string failures(const LayoutReference& reference, const LayoutJob& job,
                     const LayoutRunOptions& options, const LayoutTolerances& tolerances = {});
std::string failures(const std::vector<LayoutCheck>& checks);

}  // namespace dstrain::test
