// Resuming at another layout: a checkpoint of one layout, read by another, has the same parameters
// and moments bit for bit, and the run goes on as if one rank had made it from the start.
#include <algorithm>
#include <vector>

#include "apps/assemble.h"
#include "core/base/rng.h"
#include "core/checkpoint/reshard.h"
#include "core/checkpoint/state_boxes.h"
#include "test/support/catch.h"
#include "test/support/layout_jobs.h"
#include "test/support/temp_folder.h"

namespace dstrain::test {
namespace {

constexpr int64_t kLayers = 8, kSavedStep = 3, kSteps = 6;

Config job_of(TinyModel model) {
  Config config = model == TinyModel::moe ? tiny_moe_job(kLayers) : tiny_dense_job(kLayers);
  config.model.tie_word_embeddings = true;
  if (model == TinyModel::moe) config.model.num_nextn_predict_layers = 1;
  return config;
}

std::vector<LayoutJob> layouts_of(TinyModel model) {
  std::vector<LayoutJob> jobs;
  for (const int ranks : {1, 2, 4, 8})
    for (const int64_t zero : {0, 1, 2, 3})
      for (const LayoutJob& job : all_layouts(model, ranks, zero)) {
        const PipelineOrder schedule = job.config.parallel.schedule;
        if (layers_for(job.shape, schedule) <= kLayers)
          jobs.push_back(job_at(job_of(model), job.shape, zero, schedule));
      }
  return jobs;
}

struct SavedRun {
  LayoutRun run;
  std::string checkpoint;
};

SavedRun run_and_save(const LayoutReference& reference, const LayoutJob& job,
                      const std::string& folder) {
  CheckpointStore store(folder, 2);
  const SaveAttempt attempt = store.begin(kSavedStep);
  std::vector<ShardInfo> shards;
  LayoutRunOptions options = replay_options(reference);
  options.steps = kSavedStep;
  options.at_end = [&](TrainEngine& engine) {
    const int rank = engine.distribution().place().in_world().rank;
    shards.push_back(store.write_shard(attempt, rank, state_tensors(engine)));
  };
  SavedRun saved{run_layout(job.config, job.shape, options), ""};
  CheckpointMeta meta;
  meta.step = kSavedStep;
  saved.checkpoint = store.commit(attempt, shards, meta);
  return saved;
}

// What it has before its first step, where steps is 0.
LayoutRun resume(const LayoutReference& reference, const LayoutJob& job,
                 const std::string& checkpoint, int64_t steps) {
  LayoutRunOptions options = replay_options(reference);
  options.first_step = kSavedStep;
  options.steps = steps;
  options.at_start = [&](TrainEngine& engine) {
    CheckpointReader reader(checkpoint);
    load_state(engine, reader, /*with_optimizer=*/true);
  };
  return run_layout(job.config, job.shape, options);
}

// The reference from the saved step on. Its first moments are no gradients of a first step any
// more.
LayoutRun rest_of(LayoutRun run) {
  run.steps.erase(run.steps.begin(), run.steps.begin() + kSavedStep);
  run.first_moments.clear();
  return run;
}

void check_pairs(TinyModel model, uint64_t seed, int pairs) {
  const LayoutReference reference(job_of(model), kSteps);
  const std::vector<LayoutJob> jobs = layouts_of(model);
  for (int pair = 0; pair < pairs; ++pair) {
    auto any = [&](uint64_t which) {
      return jobs[random_u64(seed, which, static_cast<uint64_t>(pair)) % jobs.size()];
    };
    const LayoutJob from = any(0), to = any(1);
    INFO(to_text(from) << " -> " << to_text(to));
    const TempFolder folder;
    const SavedRun saved = run_and_save(reference, from, folder.path());
    const LayoutRun loaded = resume(reference, to, saved.checkpoint, 0);
    CHECK(loaded.state.size() == saved.run.state.size());
    CHECK(bit_difference(saved.run.state, loaded.state) == "");
    CHECK(loaded.disagreement == "");
    const LayoutRun resumed = resume(reference, to, saved.checkpoint, kSteps - kSavedStep);
    CHECK(failures(compare_layouts(to.config, rest_of(reference.run), resumed)) == "");
  }
}

TEST_CASE("layouts: 12 random pairs, experts saved at one and resumed at the other", "[ranks]") {
  check_pairs(TinyModel::moe, 11, 12);
}

TEST_CASE("layouts: 8 random pairs, a dense model saved at one and resumed at the other",
          "[ranks]") {
  check_pairs(TinyModel::dense, 12, 8);
}

}  // namespace
}  // namespace dstrain::test
